package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

// progress shows long work: a bar on a terminal, JSON lines when asked, nothing otherwise.
type progress struct {
	mu    sync.Mutex
	what  string
	out   io.Writer
	json  bool
	group *mpb.Progress
	bar   *mpb.Bar
	last  time.Time
}

func newProgress(out io.Writer, what string, asJSON bool) *progress {
	p := &progress{what: what, out: out, json: asJSON}
	if f, ok := out.(*os.File); ok && !asJSON && isTerminal(f) {
		p.group = mpb.New(mpb.WithOutput(out), mpb.WithWidth(60))
	}
	return p
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil && os.Getenv("TERM") != "dumb"
}

// Set says how many bytes of how many are done.
func (p *progress) Set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.json:
		if time.Since(p.last) < time.Second && done != total {
			return
		}
		p.last = time.Now()
		_ = json.NewEncoder(p.out).Encode(map[string]any{"message_type": "progress", "what": p.what, "bytes_done": done, "bytes_total": total})
	case p.group != nil:
		if p.bar == nil {
			p.bar = p.group.AddBar(total,
				mpb.PrependDecorators(decor.Name(p.what+" ")),
				mpb.AppendDecorators(decor.Percentage(), decor.Name("  "), decor.CountersKibiByte("% .1f of % .1f")))
		}
		p.bar.SetTotal(total, false)
		p.bar.SetCurrent(done)
	}
}

// Note says what the work waits for, one line for each reason.
func (p *progress) Note(reasons []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.json {
		_ = json.NewEncoder(p.out).Encode(map[string]any{"message_type": "waiting", "what": p.what, "reasons": reasons})
		return
	}
	out := p.out
	if p.group != nil {
		out = p.group // above the bar
	}
	fmt.Fprintf(out, "%s: %s\n", p.what, strings.Join(reasons, "\n  "))
}

// Done takes the bar off.
func (p *progress) Done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		p.bar.Abort(true)
	}
	if p.group != nil {
		p.group.Wait()
	}
}
