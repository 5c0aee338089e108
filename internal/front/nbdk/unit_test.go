package nbdk

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/mdlayher/netlink"

	abi "tidemark/internal/abi/nbd"
	"tidemark/internal/front/nbd"
)

// TestCommand: a command is encoded as the kernel reads it, and nothing is sent that was not said.
func TestCommand(t *testing.T) {
	ours, theirs, err := pairs(2)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(ours)
	defer closeAll(theirs)
	raw, err := command{index: 3, size: 1 << 20, dead: 1500 * time.Millisecond, backend: "b#2", sockets: theirs}.attributes()
	if err != nil {
		t.Fatal(err)
	}
	d, err := netlink.NewAttributeDecoder(raw)
	if err != nil {
		t.Fatal(err)
	}
	var fds []uint32
	seen := map[uint16]uint64{}
	for d.Next() {
		switch d.Type() {
		case abi.AttrIndex:
			seen[abi.AttrIndex] = uint64(d.Uint32())
		case abi.AttrBackend:
			if s := d.String(); s != "b#2" {
				t.Errorf("backend %q", s)
			}
		case abi.AttrSockets:
			d.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(item *netlink.AttributeDecoder) error {
						for item.Next() {
							fds = append(fds, item.Uint32())
						}
						return nil
					})
				}
				return nil
			})
		default:
			seen[d.Type()] = d.Uint64()
		}
	}
	if err := d.Err(); err != nil {
		t.Fatal(err)
	}
	want := map[uint16]uint64{abi.AttrIndex: 3, abi.AttrSizeBytes: 1 << 20, abi.AttrDeadConnTimeout: 2}
	for k, v := range want {
		if seen[k] != v {
			t.Errorf("attribute %d is %d, not %d", k, seen[k], v)
		}
	}
	if len(seen) != len(want) || len(fds) != 2 || fds[0] != uint32(theirs[0].Fd()) || fds[1] != uint32(theirs[1].Fd()) {
		t.Errorf("attributes %v, sockets %v", seen, fds)
	}
}

// TestHeld: whether the kernel kept its end is seen at once.
func TestHeld(t *testing.T) {
	ours, theirs, err := pairs(1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(ours)
	if !held(ours[0]) {
		t.Error("the other end is open")
	}
	if _, err := theirs[0].Write([]byte("a request at once")); err != nil {
		t.Fatal(err)
	}
	if !held(ours[0]) {
		t.Error("the other end is open, and has sent something")
	}
	closeAll(theirs)
	if held(ours[0]) {
		t.Error("the other end is closed")
	}
}

// TestRefused: what cannot be attached is refused before the kernel is asked,
// and a kernel that cannot do it is named.
func TestRefused(t *testing.T) {
	s := &nbd.Server{}
	if err := s.Add(nbd.Export{Name: "odd", Device: fixed(1000)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(nbd.Export{Name: "even", Device: fixed(4096)}); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]Options{"odd": {Identity: "x"}, "even": {Identity: "x#1"}, "no": {Identity: "x"}} {
		if _, err := Attach(t.Context(), s, name, o); err == nil || errors.Is(err, ErrNoKernel) {
			t.Errorf("%s as %+v: %v", name, o, err)
		}
	}
	if _, err := Attach(t.Context(), s, "even", Options{Identity: "x", Connections: connectionsMax + 1}); err == nil || errors.Is(err, ErrNoKernel) {
		t.Errorf("too many connections: %v", err)
	}
	if _, err := Reattach(t.Context(), s, "even", "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing to serve again: %v", err)
	}
	if err := Forget(context.Background(), "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("nothing to forget: %v", err)
	}
	if _, err := os.Stat("/sys/module/nbd"); err != nil && os.Geteuid() == 0 {
		if err := Probe(); !errors.Is(err, ErrNoKernel) {
			t.Errorf("no such thing in this kernel: %v", err)
		}
		if _, err := Attach(t.Context(), s, "even", Options{Identity: "x", Wait: time.Second}); !errors.Is(err, ErrNoKernel) {
			t.Errorf("no such thing in this kernel: %v", err)
		}
	}
}

type fixed int64

func (fixed) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (fixed) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (fixed) Flush() error                           { return nil }
func (f fixed) Size() int64                          { return int64(f) }
