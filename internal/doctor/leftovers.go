package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tidemark/internal/tap"
)

// DefaultState is the state folder of a daemon that is given none.
const DefaultState = "/var/lib/tidemark"

// Places are where daemons of this machine keep their things.
type Places struct {
	States []string // state folders; none: DefaultState
	Vaults []string // folders of vaults
}

// Pin is one tap found pinned.
type Pin struct {
	Instance string   `json:"instance"`
	Group    string   `json:"group"`
	Disks    []string `json:"disks,omitempty"`
	Orphan   bool     `json:"orphan"` // neither a state folder nor a process has it
	Reason   string   `json:"reason"` // who has it, or why nobody does
}

// Lock is one lock file. Locks are the kernel's and end with their process:
// a file that nobody holds is in nobody's way, and stays.
type Lock struct {
	Path string `json:"path"`
	Held bool   `json:"held"`
	PID  int    `json:"pid,omitempty"` // 0: not a process that can be seen from here
	By   string `json:"by,omitempty"`  // the process's name
}

// Fix is something that can be done about a leftover. Action says all that Apply does.
type Fix struct {
	Code    string `json:"code"`
	Subject string `json:"subject"`
	Action  string `json:"action"`
	apply   func() error
}

// Apply does it, after looking again whether it is still called for.
func (f Fix) Apply() error { return f.apply() }

// CodeOrphan is the code of the Fix that removes an orphaned tap.
const CodeOrphan = "orphaned-tap"

// ErrNotOrphan: by now somebody has the tap.
var ErrNotOrphan = errors.New("not orphaned")

// Pins lists every pinned tap, and says which nobody owns.
func Pins(p Places) ([]Pin, error) {
	found, err := tap.Pinned()
	if err != nil {
		return nil, fmt.Errorf("pinned taps: %w", err)
	}
	var users map[ebpf.MapID]int
	if len(found) > 0 {
		if users, err = mapUsers(); err != nil {
			return nil, err
		}
	}
	var out []Pin
	for _, f := range found {
		pin := Pin{Instance: f.Instance, Group: f.Group}
		for _, t := range f.Targets {
			pin.Disks = append(pin.Disks, t.Name)
		}
		pin.Orphan, pin.Reason = p.judge(f, users)
		out = append(out, pin)
	}
	return out, nil
}

func (p Places) states() []string {
	if len(p.States) == 0 {
		return []string{DefaultState}
	}
	return p.States
}

// judge says whether nobody owns a pinned tap. A daemon that is stopped owns
// its taps: capture goes on without it.
func (p Places) judge(f tap.Pin, users map[ebpf.MapID]int) (orphan bool, reason string) {
	if pid := userOf(f, users); pid != 0 {
		return false, fmt.Sprintf("process %d (%s) has it open", pid, comm(pid))
	}
	states := p.states()
	if own := tap.Owner(f.Instance, f.Group); own != "" && !slices.Contains(states, own) {
		states = append(slices.Clone(states), own)
	}
	for _, state := range states {
		b, err := os.ReadFile(filepath.Join(state, "instance"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Sprintf("cannot tell: %v", err)
		}
		if strings.TrimSpace(string(b)) != f.Instance {
			continue
		}
		switch _, err := os.Stat(filepath.Join(state, "groups", f.Group)); {
		case err == nil:
			return false, "it belongs to the daemon of " + state
		case !errors.Is(err, fs.ErrNotExist):
			return false, fmt.Sprintf("cannot tell: %v", err)
		}
		return true, fmt.Sprintf("the daemon of %s has no such group", state)
	}
	return true, fmt.Sprintf("no process has it open, and its instance is not that of %s", strings.Join(states, " or "))
}

// userOf is a process that has one of a tap's maps open, 0 where none has.
func userOf(f tap.Pin, users map[ebpf.MapID]int) int {
	maps, _ := filepath.Glob(filepath.Join("/sys/fs/bpf/tidemark", f.Instance, f.Group, "map_*"))
	for _, path := range maps {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			continue
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			continue
		}
		if id, ok := info.ID(); ok && users[id] != 0 {
			return users[id]
		}
	}
	return 0
}

// mapUsers says which processes have which BPF maps open.
func mapUsers() (map[ebpf.MapID]int, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	if err != nil {
		return nil, err
	}
	users := map[ebpf.MapID]int{}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // closed by now
		}
		_, rest, ok := strings.Cut(string(b), "map_id:")
		if !ok {
			continue
		}
		line, _, _ := strings.Cut(rest, "\n")
		id, err1 := strconv.ParseUint(strings.TrimSpace(line), 10, 32)
		pid, err2 := strconv.Atoi(strings.Split(path, "/")[2])
		if err1 == nil && err2 == nil && pid != os.Getpid() {
			users[ebpf.MapID(id)] = pid
		}
	}
	return users, nil
}

func comm(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(b))
}

// Fixes lists what can be done about the pins that Pins found; nothing is done before Apply.
func Fixes(p Places, pins []Pin) []Fix {
	var out []Fix
	for _, pin := range pins {
		if !pin.Orphan {
			continue
		}
		out = append(out, Fix{Code: CodeOrphan, Subject: pin.Instance + "/" + pin.Group,
			Action: fmt.Sprintf("remove the tap of group %s, instance %s, on %s: capture ends, and what its ring holds is lost (%s)",
				pin.Group, pin.Instance, strings.Join(pin.Disks, ", "), pin.Reason),
			apply: func() error { return p.discard(pin) }})
	}
	return out
}

func (p Places) discard(pin Pin) error {
	now, err := Pins(p)
	if err != nil {
		return err
	}
	for _, n := range now {
		if n.Instance != pin.Instance || n.Group != pin.Group {
			continue
		}
		if !n.Orphan {
			return fmt.Errorf("tap of group %s: %w: %s", n.Group, ErrNotOrphan, n.Reason)
		}
		return tap.Discard(n.Instance, n.Group)
	}
	return nil // gone already
}

// Locks lists the lock files of the places, and who holds them.
func Locks(p Places) ([]Lock, error) {
	held, err := heldLocks()
	if err != nil {
		return nil, err
	}
	var patterns []string
	for _, s := range p.states() {
		patterns = append(patterns, filepath.Join(s, "lock"), filepath.Join(s, "groups/*/lock"), filepath.Join(s, "groups/*/*/lock"))
	}
	for _, v := range p.Vaults {
		patterns = append(patterns, filepath.Join(v, "groups/*/lock"))
	}
	var out []Lock
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", pattern, err)
		}
		for _, path := range paths {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				continue // gone by now
			}
			l := Lock{Path: path}
			if pid, ok := held[st.Ino]; ok {
				l.Held, l.PID = true, max(pid, 0)
				l.By = comm(l.PID)
			}
			out = append(out, l)
		}
	}
	return out, nil
}

// heldLocks are the holders of file locks by inode. Taking a lock to see
// whether it is free could make a daemon fail that starts at that moment; so
// the kernel's list is read. Its device numbers are not those of stat on btrfs
// and are left out: an inode number alone can at worst show a lock as held that is not.
func heldLocks() (map[uint64]int, error) {
	f, err := os.Open("/proc/locks")
	if err != nil {
		return nil, fmt.Errorf("locks: %w", err)
	}
	defer f.Close()
	out := map[uint64]int{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 1: FLOCK  ADVISORY  WRITE 716 fe:00:9981969 0 EOF
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" {
			continue
		}
		pid, err1 := strconv.Atoi(fields[4])
		at := strings.Split(fields[5], ":")
		inode, err2 := strconv.ParseUint(at[len(at)-1], 10, 64)
		if err1 == nil && err2 == nil {
			out[inode] = pid
		}
	}
	return out, lines.Err()
}
