package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/diff"
	"tidemark/internal/freeze"
	fuseloop "tidemark/internal/front/loop"
)

// What touches a file that may lie on a device of ours is done by short-lived
// helper processes: it can wait for requests that this process serves. Killed in
// such a wait, this process would never end, as nobody serves them any more, and
// the next one could not take the device over. A helper that waits is left behind
// by whoever kills us; it ends when the device is served again.
const (
	fileTime = 2 * time.Minute // for a task, growing a file included
	lookTime = 30 * time.Second
)

// fileVerb is the helper's action, besides those of the loop front.
const fileVerb = "file"

// fileQuestion is what a helper is asked: to do a task, or else to look at a path.
type fileQuestion struct {
	Task *diff.Task `json:"task,omitempty"`
	Look string     `json:"look,omitempty"`
}

type fileAnswer struct {
	Done  diff.Done `json:"done"`
	Found found     `json:"found"`
	Error string    `json:"error,omitempty"`
	Kind  string    `json:"kind,omitempty"` // of the error: a name in fileErrors
}

// found is what a path is.
type found struct {
	Device uint64 `json:"device"` // its number, of a block device; of a file that below its file system
	File   bool   `json:"file"`   // or not there yet
}

// fileErrors are those that callers branch on, by name.
var fileErrors = map[string]error{"refused": diff.ErrRefused, "corrupt": diff.ErrCorrupt, "absent": fs.ErrNotExist, "full": unix.ENOSPC,
	"denied": fs.ErrPermission, "errors": unix.EIO}

// fileTask does a task of difference storage in a helper.
func (s *Server) fileTask(t diff.Task) (diff.Done, error) {
	a, err := s.askHelper(fileTime, fileQuestion{Task: &t})
	return a.Done, err
}

// look says what a path is, or will be when it is made.
func (s *Server) look(path string) (found, error) {
	a, err := s.askHelper(lookTime, fileQuestion{Look: path})
	return a.Found, err
}

// askHelper has a helper answer in time. It waits neither for a helper that
// hangs nor, once the server stops, for any.
func (s *Server) askHelper(atMost time.Duration, q fileQuestion) (fileAnswer, error) {
	if len(s.env.Helper) == 0 {
		a := answer(q)
		return a, a.failure()
	}
	ctx, cancel := context.WithTimeout(s.watch0, atMost)
	defer cancel()
	question, err := json.Marshal(q)
	if err != nil {
		return fileAnswer{}, err
	}
	cmd := exec.Command(s.env.Helper[0], append(s.env.Helper[1:len(s.env.Helper):len(s.env.Helper)], fileVerb)...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no signal of the terminal's is for it
	in, err := cmd.StdinPipe()
	if err != nil {
		return fileAnswer{}, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fileAnswer{}, errors.Join(err, in.Close())
	}
	if err := cmd.Start(); err != nil {
		return fileAnswer{}, fmt.Errorf("starting %s: %w", s.env.Helper[0], err)
	}
	type reply struct {
		fileAnswer
		err error
	}
	replies := make(chan reply, 1)
	go func() { // ends with the helper, be it later
		var r reply
		if _, r.err = in.Write(append(question, '\n')); r.err == nil {
			r.err = json.NewDecoder(out).Decode(&r.fileAnswer)
		}
		replies <- r
		_ = in.Close() // which ends a helper that has not answered
		_ = cmd.Wait() // says nothing that the answer has not said
	}()
	select {
	case r := <-replies:
		if r.err != nil {
			return fileAnswer{}, fmt.Errorf("the helper process ended without an answer: %w", r.err)
		}
		return r.fileAnswer, r.failure()
	case <-ctx.Done():
		_ = cmd.Process.Kill() // it may have ended
		return fileAnswer{}, fmt.Errorf("the file system did not answer within %v: %w", atMost, context.Cause(ctx))
	}
}

func (a fileAnswer) failure() error {
	if a.Error == "" {
		return nil
	}
	return &fileError{a.Error, fileErrors[a.Kind]}
}

// fileError has the helper's text, which names its sentinel already.
type fileError struct {
	text string
	is   error
}

func (e *fileError) Error() string { return e.text }
func (e *fileError) Unwrap() error { return e.is }

// HelperMain is a helper process: the loop front's, or one that does something to a file.
func HelperMain(args []string) error {
	if len(args) != 1 || args[0] != fileVerb {
		return fuseloop.HelperMain(args)
	}
	freeze.LeaveControlGroup() // a service manager that restarts the server must not wait for us
	var q fileQuestion
	in := json.NewDecoder(os.Stdin)
	if err := in.Decode(&q); err != nil {
		return fmt.Errorf("this is started by the server of a device, not by hand: %w", err)
	}
	go func() { // the server holds the other end as long as it lives
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	return json.NewEncoder(os.Stdout).Encode(answer(q))
}

func answer(q fileQuestion) (a fileAnswer) {
	var err error
	if q.Task != nil {
		a.Done, err = diff.Do(*q.Task)
	} else {
		a.Found, err = lookAt(q.Look)
	}
	if err != nil {
		a.Error = err.Error()
		for name, is := range fileErrors {
			if errors.Is(err, is) {
				a.Kind = name
			}
		}
	}
	return a
}

func lookAt(path string) (found, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Stat(filepath.Dir(path), &st)
	}
	if err != nil {
		return found{}, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return found{Device: st.Rdev}, nil
	}
	return found{Device: st.Dev, File: true}, nil
}
