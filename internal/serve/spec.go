package serve

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"tidemark/internal/health"
	"tidemark/internal/splice"
	"tidemark/internal/stack"
)

// Spec is what a user asks for.
type Spec struct {
	Name    string `json:"name"`
	Backing string `json:"backing"` // absolute path of a disk or file
	Front   string `json:"front"`   // of Fronts, or "auto"
	// Listen is where the front nbd-server listens, as an NBD URI; "" is a unix socket in the state folder.
	Listen   string `json:"listen,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// Copy: the front ublk copies data even where it need not.
	Copy bool `json:"copy,omitempty"`
	// ID is given by Create; the kernel's device is found again by it.
	ID string `json:"id"`
	// Splice says under which mapped device it lies; nil: it stands for itself.
	Splice *splice.Splice `json:"splice,omitempty"`
	// GiveBack is how long a spliced volume waits for a daemon until its guard
	// gives it its own table back; 0: for ever.
	GiveBack time.Duration `json:"give_back,omitempty"`
}

// token is ID as a number.
func (s Spec) token() uint64 {
	n, _ := strconv.ParseUint(s.ID, 16, 64) // 0 matches no device that Create has made
	return n
}

// Info is how a device is.
type Info struct {
	Spec
	Node       string             // a block device, or an NBD URI
	Kernel     string             // the kernel's own name for it; "" for nbd-server
	Size       int64              // bytes
	Open       bool               // somebody uses it
	Filters    []stack.Info       // highest altitude first
	Conditions []health.Condition // what is wrong with it
}

var nameOK = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckName returns an error that wraps ErrName where no device can be called so.
func CheckName(name string) error {
	if !nameOK.MatchString(name) {
		return fmt.Errorf("%q: %w: want 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit", name, ErrName)
	}
	return nil
}

// check completes a spec, or refuses it.
func (s *Server) check(spec *Spec) error {
	if err := CheckName(spec.Name); err != nil {
		return err
	}
	path, err := filepath.EvalSymlinks(spec.Backing)
	if err != nil {
		return err
	}
	spec.Backing = path
	for _, d := range s.list() {
		other := d.now().spec
		if other.Name == spec.Name {
			return fmt.Errorf("%s: %w", spec.Name, ErrExists)
		}
		if !d.past() && same(other.Backing, path) { // of those that are, another has the number by now
			return fmt.Errorf("%s is %w: it backs the device %s", path, ErrInUse, other.Name)
		}
	}
	if name := s.ownUnder(path); name != "" {
		return fmt.Errorf("%s is %w: it is, or lies on, %s, which this daemon serves, and which it would wait for itself", path, ErrInUse, name)
	}
	if s.env.Taken != nil {
		if who := s.env.Taken(path); who != "" {
			return fmt.Errorf("%s is %w: %s", path, ErrInUse, who)
		}
	}
	if spec.Front == "" || spec.Front == Auto {
		if spec.Front = s.best(); spec.Front == "" {
			return fmt.Errorf("%w: none of %s", ErrFront, strings.Join(Fronts, ", "))
		}
	}
	f := s.fronts[spec.Front]
	if f == nil {
		return fmt.Errorf("%q: %w: want %s, %s", spec.Front, ErrNoFront, Auto, strings.Join(Fronts, ", "))
	}
	if spec.Listen != "" && spec.Front != FrontNBDServer {
		return fmt.Errorf("%q: %w: only %s listens, not %s", spec.Listen, ErrNoFront, FrontNBDServer, spec.Front)
	}
	if err := f.probe(); err != nil {
		return fmt.Errorf("%s: %w: %w", spec.Front, ErrFront, err)
	}
	return nil
}

func same(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return a == b
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// List gives the devices by name.
func (s *Server) List() []Info {
	out := []Info{}
	for _, d := range s.list() {
		out = append(out, s.info(d))
	}
	return out
}

// Nodes gives what users open, by the names of the devices; "" of one that is
// offline. It asks nobody who has them open, which List does.
func (s *Server) Nodes() map[string]string {
	out := map[string]string{}
	for _, d := range s.list() {
		now := d.now()
		out[now.spec.Name] = ""
		if now.served != nil {
			out[now.spec.Name] = s.node(now)
		}
	}
	return out
}

func (s *Server) info(d *Device) Info {
	now := d.now()
	i := Info{Spec: now.spec, Conditions: d.health.List()}
	if now.served != nil {
		i.Kernel, i.Size, i.Open = now.served.kernel(), now.lower.Size(), now.served.open()
		i.Node = s.node(now)
		i.Filters = now.stack.Filters()
	}
	return i
}
