package loop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/loop"
)

// helperTime bounds what a helper does, a flush of the device's page cache included.
const helperTime = 30 * time.Second

// Presented is a device that this process serves. Whatever touches the loop
// device is done by short-lived helper processes: see the package comment.
type Presented struct {
	// Path is the loop device's node.
	Path string

	helper []string
	mount  *os.File
	served chan struct{}
	err    error
}

// Present serves dev in this process and has a helper put a loop device over
// it, which stays until Detach or the end of this process; then it gives I/O
// errors. helper is the command line of a process that calls HelperMain, beginning with its path.
func Present(ctx context.Context, helper []string, dev block.Device, o loop.Options) (*Presented, error) {
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	p := &Presented{helper: helper, served: make(chan struct{})}
	opts, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	h, err := startHelper(ctx, helper, nil, "attach", string(opts))
	if err != nil {
		return nil, err
	}
	files, err := h.files()
	if err != nil {
		return nil, h.end(fmt.Errorf("a FUSE file system for the device: %w", err))
	}
	p.mount = files[1]
	go func() {
		defer close(p.served)
		p.err = Serve(files[0], dev)
	}()
	line, err := h.line()
	if err = h.end(err); err != nil {
		return nil, errors.Join(err, p.mount.Close())
	}
	p.Path = line
	return p, nil
}

// Done is closed when nobody can use the device any more.
func (p *Presented) Done() <-chan struct{} { return p.served }

// Resized makes the loop device as large as the device is now.
func (p *Presented) Resized(ctx context.Context) error {
	return p.run(ctx, "resize", p.Path)
}

// Detach takes the loop device away. loop.ErrBusy: somebody still has it open;
// it goes with them, and Done tells when. Not to be called concurrently.
func (p *Presented) Detach(ctx context.Context) error {
	select {
	case <-p.served: // the loop device may be somebody else's by now
		return p.err
	default:
	}
	err := p.run(ctx, "detach", p.Path)
	if p.mount != nil {
		err = errors.Join(err, p.mount.Close())
		p.mount = nil
	}
	return err
}

// Forget detaches a loop device whose server is gone. loop.ErrBusy: somebody
// still has it open, and gets nothing but I/O errors.
func Forget(ctx context.Context, helper []string, path string) error {
	return (&Presented{helper: helper}).run(ctx, "detach", path)
}

func (p *Presented) run(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	h, err := startHelper(ctx, p.helper, p.mount, args...)
	if err != nil {
		return err
	}
	_, err = h.line()
	return h.end(err)
}

// helperProcess is a helper seen from the server.
type helperProcess struct {
	cmd  *exec.Cmd
	conn *net.UnixConn
}

func startHelper(ctx context.Context, helper []string, mount *os.File, args ...string) (*helperProcess, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "helper"), os.NewFile(uintptr(pair[1]), "helper")
	defer theirs.Close()
	c, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, err
	}
	conn := c.(*net.UnixConn)
	if deadline, ok := ctx.Deadline(); ok {
		err = conn.SetDeadline(deadline)
	}
	cmd := exec.CommandContext(ctx, helper[0], append(helper[1:], args...)...)
	cmd.Dir, cmd.WaitDelay = "/", time.Second
	cmd.ExtraFiles = []*os.File{theirs}
	if mount != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, mount)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no signal of the terminal's is for it
	if err = errors.Join(err, cmd.Start()); err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", helper[0], err), conn.Close())
	}
	return &helperProcess{cmd, conn}, nil
}

// files receives the connection and the mount.
func (h *helperProcess) files() ([]*os.File, error) {
	var text [512]byte
	oob := make([]byte, unix.CmsgSpace(2*4))
	n, oobn, _, _, err := h.conn.ReadMsgUnix(text[:], oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, helperSaid(string(text[:n]))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 2 {
		return nil, errors.Join(fmt.Errorf("%d descriptors instead of 2", len(fds)), err)
	}
	return []*os.File{os.NewFile(uintptr(fds[0]), "/dev/fuse"), os.NewFile(uintptr(fds[1]), "fuse")}, nil
}

// line is what the helper has to say: a result, or an error after a "!".
func (h *helperProcess) line() (string, error) {
	all, err := io.ReadAll(io.LimitReader(h.conn, 4096))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrHang, err)
	}
	text, ok := strings.CutSuffix(string(all), "\n")
	if !ok || strings.HasPrefix(text, "!") {
		return "", helperSaid(text)
	}
	return text, nil
}

func helperSaid(text string) error {
	text = strings.TrimSuffix(strings.TrimPrefix(text, "!"), "\n")
	if rest, ok := strings.CutPrefix(text, "busy "); ok {
		return fmt.Errorf("%s: %w", rest, loop.ErrBusy)
	}
	if text == "" {
		text = "it ended without a word"
	}
	return fmt.Errorf("the helper process: %s", text)
}

// end waits for the helper; a failed one is killed.
func (h *helperProcess) end(err error) error {
	if err != nil {
		_ = h.cmd.Process.Kill() // it may have ended
	}
	_ = h.conn.Close()
	_ = h.cmd.Wait() // says nothing that the socket has not said
	return err
}

// HelperMain is a helper process: its arguments are those that the server gives
// it, and descriptor 3 leads to the server.
func HelperMain(args []string) error {
	sock := os.NewFile(3, "server")
	c, err := net.FileConn(sock)
	if err = errors.Join(err, sock.Close()); err != nil {
		return fmt.Errorf("this is started by the server of a device, not by hand: %w", err)
	}
	conn, ok := c.(*net.UnixConn)
	if !ok || len(args) != 2 {
		return errors.New("this is started by the server of a device, not by hand")
	}
	text := "done"
	switch args[0] {
	case "attach":
		text, err = helpAttach(conn, args[1])
	case "resize":
		err = helpResize(args[1])
	case "detach":
		err = loop.Detach(args[1])
	default:
		err = fmt.Errorf("no action %q", args[0])
	}
	switch {
	case errors.Is(err, loop.ErrBusy):
		text = "!busy " + args[1]
	case err != nil:
		text = "!" + strings.ReplaceAll(err.Error(), "\n", " ")
	}
	_, err = io.WriteString(conn, text+"\n")
	return errors.Join(err, conn.Close())
}

func helpAttach(conn *net.UnixConn, opts string) (string, error) {
	var o loop.Options
	if err := json.Unmarshal([]byte(opts), &o); err != nil {
		return "", err
	}
	e, err := New()
	if err != nil {
		return "", err
	}
	defer e.Close()
	if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(e.Conn.Fd()), int(e.mount.Fd())), nil); err != nil {
		return "", err
	}
	if err := e.Started(); err != nil {
		return "", err
	}
	dev, err := e.attach(o) // the server kills this process when it takes too long
	if err != nil {
		return "", err
	}
	return dev.Path, dev.Close()
}

// helpResize has the kernel ask for the file's size, then tells the loop device.
func helpResize(path string) error {
	f, err := os.OpenFile("/proc/self/fd/4", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the served file: %w", err)
	}
	defer f.Close()
	if _, err := f.Stat(); err != nil {
		return fmt.Errorf("size of the served file: %w", err)
	}
	dev, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	return unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0)
}
