// Package mount shows a view, a disk as it was at a point, as a directory tree.
//
//	view (read-only) -> overlay (scratch file) -> FUSE file -> loop device -> file system
//
// The file system's journal is replayed into the overlay, which is thrown away.
// A process of its own serves the FUSE file (ServeMain). Nothing watches for the umount: the file system
// is the only user of the loop device, the loop device the only user of the
// FUSE file, and each goes with its last user; the server is told by the
// kernel, removes the scratch and ends. That holds for umount by anybody, lazy
// ones and reboots too, and after a kill of any process.
package mount

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	fuseloop "tidemark/internal/front/loop"
	"tidemark/internal/loop"
)

// Refusals that callers branch on. The error's text says more.
var (
	ErrNoFileSystem = errors.New("no file system that can be mounted was found")
	ErrPartition    = errors.New("which partition is meant cannot be told")
	ErrSameFS       = errors.New("the same file system is present on this machine")
	ErrDir          = errors.New("not a folder to mount on")
	ErrTaken        = errors.New("the folder is taken")
)

// attachWait is how long the loop device may take. Opening the view and replaying
// a journal take as long as they take, or until the caller's context ends.
const attachWait = 30 * time.Second

// Options of Mount. Spec and Server are needed.
type Options struct {
	// Spec tells the serving process's Opener how to open the same view.
	Spec json.RawMessage
	// Server is the command line of a process that calls ServeMain, beginning
	// with its path: as a rule os.Executable and a hidden verb.
	Server []string
	// Scratch is the folder for the overlay's changes; "" is the system's for temporary files.
	Scratch string
	// Partition is the number of the partition to mount; 0 where the disk has no partition table.
	Partition int
	// Writable lets users change the tree. The changes are thrown away.
	Writable bool
	// Type overrides what is detected, with a name that the kernel knows.
	Type string
	// Visible are folders that the tree must not hide: the vault that it is read from.
	Visible []string
	// Data is given to the file system as it is (as in `mount -o`).
	Data string
}

// Mount mounts the file system of view at dir, read-only (its journal is
// replayed all the same) unless o.Writable. It returns when the tree is there; a
// process in the background serves it until it is unmounted. view is only
// used to look at what is there, and can be closed afterwards. On any error
// nothing is left.
func Mount(ctx context.Context, view block.Device, dir string, o Options) error {
	at, err := mountpoint(dir, o.Visible)
	if err != nil {
		return err
	}
	part, err := choose(view, o.Partition)
	if err != nil {
		return err
	}
	fs := fileSystem{kind: o.Type}
	if o.Type == "" || o.Type == "btrfs" {
		if fs, err = detect(view, part); err != nil {
			return err
		}
	}
	if fs.kind == "btrfs" {
		if err := checkBtrfs(fs.uuid); err != nil {
			return err
		}
	}
	export, err := fuseloop.New()
	if err != nil {
		return err
	}
	defer export.Close()
	s, err := startServer(ctx, export, o)
	if err != nil {
		return err
	}
	if err := mountExport(ctx, export, s, part, fs, at, o); err != nil {
		export.Close() // lets the server end by itself
		s.end()
		return err
	}
	return nil
}

// mountpoint is where a tree may go: a folder on which nothing is mounted yet,
// as its users would lose it, and which none of visible lies in.
func mountpoint(dir string, visible []string) (string, error) {
	at, err := filepath.Abs(dir)
	if err == nil {
		at, err = filepath.EvalSymlinks(at)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrDir, err)
	}
	if st, err := os.Stat(at); err != nil || !st.IsDir() {
		return "", errors.Join(fmt.Errorf("%s: %w", dir, ErrDir), err)
	}
	for _, v := range visible {
		real, err := filepath.EvalSymlinks(v)
		if err != nil {
			return "", err
		}
		if real == at || strings.HasPrefix(real, strings.TrimSuffix(at, "/")+"/") {
			return "", fmt.Errorf("%s: %w: it would hide %s, which is read from; choose another folder", dir, ErrTaken, v)
		}
	}
	if there, err := mountinfo.Mounted(at); err != nil || there {
		return "", errors.Join(err, fmt.Errorf("%s: %w: something is mounted there; umount it first, or choose another folder", dir, ErrTaken))
	}
	return at, nil
}

func mountExport(ctx context.Context, export *fuseloop.Export, s *server, part block.Range, fs fileSystem, at string, o Options) error {
	short, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	dev, err := export.Attach(short, loop.Options{AutoClear: true, DirectIO: true, Offset: part.Off, SizeLimit: part.Len}, s.kill)
	if err != nil {
		return err
	}
	defer dev.Close() // the file system keeps it, or nobody does
	done := make(chan error, 1)
	go func() { done <- mountDevice(dev.Path, at, fs, o) }() // ends at the latest when the server is killed
	select {
	case err = <-done:
	case <-ctx.Done():
		s.kill()
		err = fmt.Errorf("mounting: %w: %w", fuseloop.ErrHang, ctx.Err())
		if <-done == nil { // at the last moment: without a server it is of no use
			err = errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
		}
	}
	return err
}

func mountDevice(dev, at string, fs fileSystem, o Options) error {
	var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV
	if !o.Writable {
		flags |= unix.MS_RDONLY
	}
	data := o.Data
	if fs.kind == "xfs" { // its original may be mounted
		data = strings.TrimPrefix(data+",nouuid", ",")
	}
	kinds := []string{fs.kind}
	if fs.kind == "ext2" || fs.kind == "ext3" {
		kinds = append(kinds, "ext4") // whose driver serves both where they have none of their own
	}
	var err error
	for _, kind := range kinds {
		if err = unix.Mount(dev, at, kind, flags, data); !errors.Is(err, unix.ENODEV) {
			break
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("mounting %s at %s: this kernel has no %s: %w", dev, at, fs.kind, err)
	}
	return fmt.Errorf("mounting the %s at %s: %w (the kernel's log says more: dmesg)", fs.kind, at, err)
}

// server is the serving process, seen from the one that mounts.
type server struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when it has ended
}

// startServer starts it and waits until it has the view open.
func startServer(ctx context.Context, export *fuseloop.Export, o Options) (*server, error) {
	if len(o.Server) == 0 {
		return nil, errors.New("mount: no command for the serving process")
	}
	scratch := o.Scratch
	if scratch == "" {
		scratch = os.TempDir()
	}
	scratch, err := filepath.Abs(scratch)
	if err != nil {
		return nil, err
	}
	conf, err := json.Marshal(config{o.Spec, scratch})
	if err != nil {
		return nil, err
	}
	confR, confW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, confR.Close(), confW.Close())
	}
	defer readyR.Close()
	s := &server{cmd: exec.Command(o.Server[0], o.Server[1:]...), gone: make(chan struct{})}
	s.cmd.Dir = "/" // it must not keep a file system busy
	s.cmd.ExtraFiles = []*os.File{confR, export.Conn, readyW}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives the terminal
	err = s.cmd.Start()
	err = errors.Join(err, confR.Close(), readyW.Close(), export.Started())
	if err != nil {
		confW.Close()
		return nil, fmt.Errorf("starting the serving process: %w", err)
	}
	go func() { _ = s.cmd.Wait(); close(s.gone) }() // says nothing that the pipe has not said
	_, werr := confW.Write(conf)
	werr = errors.Join(werr, confW.Close())
	stop := context.AfterFunc(ctx, s.kill)
	defer stop()
	line, rerr := bufio.NewReader(readyR).ReadString('\n')
	if line = strings.TrimSpace(line); line == ready && werr == nil {
		return s, nil
	}
	s.kill()
	<-s.gone
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case line != "":
		return nil, fmt.Errorf("the serving process: %s", line)
	case errors.Is(rerr, io.EOF):
		return nil, fmt.Errorf("the serving process ended before it served: %s", s.cmd.ProcessState)
	}
	return nil, errors.Join(werr, rerr)
}

func (s *server) kill() { _ = s.cmd.Process.Kill() } // it may have ended by itself

// end waits for a server that nobody needs any more, and helps where it must.
func (s *server) end() {
	select {
	case <-s.gone:
	case <-time.After(5 * time.Second):
		s.kill()
		<-s.gone
	}
}
