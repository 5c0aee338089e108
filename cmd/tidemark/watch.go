package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"tidemark/internal/control/api"
)

// watchEvery is the time between two looks.
const watchEvery = time.Second

// watchStatus shows the status again and again until it is interrupted, which is
// its proper end. A daemon that answered once may be restarted meanwhile.
func watchStatus(ctx context.Context, c *api.Client, args []string, show func(api.Status) error, complaints io.Writer) error {
	answered, silent := false, false
	for ctx.Err() == nil {
		asked, cancel := context.WithTimeout(ctx, answerWithin)
		st, err := statusOf(asked, c, args)
		late := asked.Err() != nil
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			answered, silent = true, false
			if err := show(st); err != nil {
				return err
			}
		case !answered || !late && api.CodeOf(err) != api.CodeNoDaemon:
			return err
		case !silent: // said once, until it answers again
			silent = true
			fmt.Fprintf(complaints, "The daemon does not answer; trying again until it does: %v\n", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchEvery):
		}
	}
	return nil
}

// screen shows one status after the other: in place on a terminal, one below
// the other, with an empty line between them, elsewhere.
type screen struct {
	out   io.Writer
	shown bool
}

func newScreen(out io.Writer) *screen { return &screen{out: out} }

const (
	home       = "\x1b[H"
	clearAll   = home + "\x1b[2J"
	clearRight = "\x1b[K"
	clearBelow = "\x1b[J"
)

// show writes a whole frame at once, so that nothing flickers.
func (s *screen) show(st api.Status) error {
	c := canvas{width: terminalWidth(s.out)} // each time: it may have been resized
	printStatus(&c, st)
	frame, terminal := c.Bytes(), c.width > 0
	switch {
	case terminal:
		frame = bytes.ReplaceAll(frame, []byte("\n"), []byte(clearRight+"\n"))
		start := home
		if !s.shown {
			start = clearAll
		}
		frame = append([]byte(start), append(frame, clearBelow...)...)
	case s.shown:
		frame = append([]byte("\n"), frame...)
	}
	s.shown = true
	_, err := s.out.Write(frame)
	return err
}

// canvas collects a frame for a terminal of some width; 0: it is none.
type canvas struct {
	bytes.Buffer
	width int
}
