// Package splice puts a device of ours under a mapped device that is in use:
// an LVM volume, say, with a mounted file system. The mapped device keeps its
// name, number, openers and cache; only its table changes, from
//
//	volume ── linear, striped ──▶ disks
//
// to
//
//	volume ── linear ──▶ upper (served by us) ──▶ lower ── the same table ──▶ disks
//
// and back again. Each change is: load the new table, suspend (requests under
// way end, new ones wait), resume with the new table. Writers see a pause of
// milliseconds and no error.
//
// The kernel keeps the original table, in the lower device: nothing of it is
// written anywhere (a crypt table holds the key), and the way back needs no file.
package splice

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/dm"
)

// Errors that callers branch on.
var (
	// ErrReplaced: somebody has given the device another table. What went
	// past us since then is not known.
	ErrReplaced = errors.New("the mapped device has got another table")
	// ErrRefused: the device cannot be spliced; the text says why and what else can be done.
	ErrRefused = errors.New("this device cannot be spliced")
)

// lowerPrefix begins the names and UUIDs of lower devices.
const (
	lowerPrefix = "tidemark-lower-"
	uuidPrefix  = "TIDEMARK-LOWER-"
)

// able are the types of target whose table may live twice for a while: they
// keep no state of their own.
var able = []string{"linear", "striped", "crypt"}

const (
	useTap = "use the tap"
	twoOf  = "two live instances of its metadata would destroy it"
)

// unable says why other types are refused, and what can be done instead.
var unable = map[string][2]string{
	"multipath":       {"a multipath table is immutable", "splice the volume above it, or use the tap"},
	"thin-pool":       {"a thin pool's table is immutable", "use the tap on the thin volumes"},
	"thin":            {"a thin volume's blocks belong to its pool", useTap},
	"raid":            {twoOf, useTap},
	"mirror":          {"two live instances of its log would destroy it", useTap},
	"cache":           {twoOf, useTap},
	"writecache":      {twoOf, useTap},
	"era":             {twoOf, useTap},
	"clone":           {twoOf, useTap},
	"integrity":       {"two live instances of its journal would destroy it", useTap},
	"zoned":           {twoOf, useTap},
	"verity":          {"it is read-only: nothing is written to it", "none is needed"},
	"snapshot":        {"two live instances of one exception store would destroy it", useTap},
	"snapshot-origin": {"its snapshots would miss writes", "remove the snapshots, or use the tap"},
	"snapshot-merge":  {"a merge is under way", "wait for its end, or use the tap"},
}

// Unable says why a table with targets of these types cannot be spliced, and
// what can be done instead; "" where it can.
func Unable(types []string) (why, instead string) {
	for _, kind := range types {
		if slices.Contains(able, kind) {
			continue
		}
		reason, ok := unable[kind]
		if !ok {
			reason = [2]string{"only linear, striped and crypt tables keep no state of their own", useTap}
		}
		return fmt.Sprintf("it has a target of type %s: %s", kind, reason[0]), reason[1]
	}
	return "", ""
}

// Refuse tells whether a table can be spliced: nil, or an error that is ErrRefused.
func Refuse(name string, t dm.Table) error {
	if len(t) == 0 {
		return fmt.Errorf("%w: %s has no table in use: activate it first", ErrRefused, name)
	}
	if why, instead := Unable(t.Types()); why != "" {
		return fmt.Errorf("%w: %s: %s: %s", ErrRefused, name, why, instead)
	}
	if strings.HasPrefix(name, lowerPrefix) {
		return fmt.Errorf("%w: %s is the lower device of another splice", ErrRefused, name)
	}
	return nil
}

// Splice describes one splice. It holds no secret and can be stored as JSON.
type Splice struct {
	Name     string `json:"name"` // the mapped device's
	UUID     string `json:"uuid,omitempty"`
	Major    uint32 `json:"major"`
	Minor    uint32 `json:"minor"`
	Sectors  uint64 `json:"sectors"`  // 512 bytes each
	Original string `json:"original"` // digest of the original table
	Lower    string `json:"lower"`    // name of the device that has the original table
	Upper    string `json:"upper"`    // major:minor of the device that the new table leads to; "" before In
}

func (s *Splice) id() dm.ID { return dm.Numbered(s.Major, s.Minor) }

// Prepare makes the lower device of a mapped device, which is not touched. The
// path is the lower device's node. A lower device that an earlier attempt left
// behind is taken over if it has the same table.
func Prepare(c *dm.Control, id dm.ID) (s *Splice, path string, err error) {
	table, info, err := c.Table(id)
	if err != nil {
		return nil, "", err
	}
	if err := Refuse(info.Name, table); err != nil {
		return nil, "", err
	}
	if info.ReadOnly || info.Suspended || info.Inactive {
		return nil, "", fmt.Errorf("%w: %s is read-only, suspended, or has another table waiting: end that first", ErrRefused, info.Name)
	}
	s = &Splice{Name: info.Name, UUID: info.UUID, Major: info.Major, Minor: info.Minor, Sectors: table.Sectors(),
		Original: table.Digest(), Lower: fmt.Sprintf("%s%d-%d", lowerPrefix, info.Major, info.Minor)}
	lower := dm.Named(s.Lower)
	if _, err = c.Create(s.Lower, uuidPrefix+fmt.Sprintf("%d-%d", info.Major, info.Minor)); errors.Is(err, dm.ErrBusy) {
		if old, _, err := c.Table(lower); err != nil || old != nil && old.Digest() != s.Original {
			return nil, "", fmt.Errorf("%w: %s exists with another table: is it spliced already? Otherwise: dmsetup remove %[2]s", ErrRefused, s.Lower)
		}
	} else if err != nil {
		return nil, "", err
	}
	made, err := s.fillLower(c, lower, table)
	if err != nil {
		return nil, "", errors.Join(err, c.Remove(lower))
	}
	path, err = dm.MakeNode(made)
	if err != nil {
		return nil, "", errors.Join(err, c.Remove(lower))
	}
	return s, path, nil
}

func (s *Splice) fillLower(c *dm.Control, lower dm.ID, table dm.Table) (dm.Info, error) {
	if err := c.Load(lower, table, false); err != nil {
		if slices.Contains(table.Types(), "crypt") {
			err = fmt.Errorf("%w (the key of a crypt device must still be in the keyring that its table names)", err)
		}
		return dm.Info{}, err
	}
	return c.Resume(lower, true)
}

// Upper is how a table names a device.
func Upper(major, minor uint32) string { return fmt.Sprintf("%d:%d", major, minor) }

// In leads the mapped device to upper, which must have the same size and serve
// the lower device. After an error the device is as it was before.
func (s *Splice) In(c *dm.Control, major, minor uint32) error {
	upper := Upper(major, minor)
	if err := sameBlocks(fmt.Sprintf("%d:%d", s.Major, s.Minor), upper); err != nil {
		return err
	}
	table := dm.Table{{Start: 0, Length: s.Sectors, Type: "linear", Params: upper + " 0"}}
	if err := s.swap(c, table, false, func(now dm.Table) error {
		if now.Digest() != s.Original {
			return fmt.Errorf("%w since it was looked at: splice it again", ErrReplaced)
		}
		return nil
	}); err != nil {
		return err
	}
	s.Upper = upper
	return nil
}

// sameBlocks refuses an upper device whose logical blocks are larger: a mounted
// file system would not survive it.
func sameBlocks(device, upper string) error {
	var sizes [2]int
	for i, dev := range []string{device, upper} {
		b, err := os.ReadFile("/sys/dev/block/" + dev + "/queue/logical_block_size")
		if err != nil {
			return err
		}
		if sizes[i], err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return err
		}
	}
	if sizes[1] > sizes[0] {
		return fmt.Errorf("%w: its logical blocks have %d bytes and the served device's %d", ErrRefused, sizes[0], sizes[1])
	}
	return nil
}

// Out gives the mapped device its own table back, as the lower device has it.
// noFlush does not wait for requests under way. Where somebody else has
// given it another table meanwhile nothing is changed, and the error is ErrReplaced.
func (s *Splice) Out(c *dm.Control, noFlush bool) error {
	table, _, err := c.Table(dm.Named(s.Lower))
	if err != nil {
		return err
	}
	if table.Digest() != s.Original {
		return fmt.Errorf("%s has not the original table any more: %w", s.Lower, ErrReplaced)
	}
	return s.swap(c, table, noFlush, s.ours)
}

// Remove removes the lower device; upper must have been closed. It is no error where it is gone.
func (s *Splice) Remove(c *dm.Control) error {
	if err := c.Remove(dm.Named(s.Lower)); err != nil && !errors.Is(err, dm.ErrAbsent) {
		return err
	}
	return nil
}

// Check tells whether the mapped device still leads to upper. ErrReplaced: it
// does not. dm.ErrAbsent: it is gone.
func (s *Splice) Check(c *dm.Control) error {
	now, _, err := c.Table(s.id())
	if err != nil {
		return err
	}
	return s.ours(now)
}

func (s *Splice) ours(now dm.Table) error {
	if len(now) == 1 && now[0].Type == "linear" && now[0].Params == s.Upper+" 0" && now[0].Length == s.Sectors && s.Upper != "" {
		return nil
	}
	return fmt.Errorf("%s: %w", s.Name, ErrReplaced)
}

// LockMemory brings all of this program into memory, and keeps there what it
// has and what it will use: of what comes later, what is touched.
func LockMemory() error {
	for _, how := range []int{unix.MCL_CURRENT, unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT} { // the first alone would let go of the future
		if err := unix.Mlockall(how); err != nil {
			return err
		}
	}
	return nil
}

// swap puts another table in use. Between suspend and resume nothing here may
// wait for a disk: the pages of this program are locked first, and nothing is
// logged. An error leaves the device running with the table that it had.
func (s *Splice) swap(c *dm.Control, table dm.Table, noFlush bool, still func(dm.Table) error) error {
	if err := LockMemory(); err != nil {
		return fmt.Errorf("locking memory, without which a pause of the disk could be for ever: %w", err)
	}
	now, info, err := c.Table(s.id())
	if err != nil {
		return err
	}
	if info.Inactive {
		return fmt.Errorf("%s has another table waiting: somebody is changing it just now; try again", s.Name)
	}
	if err := still(now); err != nil {
		return err
	}
	if err := c.Load(s.id(), table, info.ReadOnly); err != nil {
		return err
	}
	if err := c.Suspend(s.id(), noFlush); err != nil {
		_, err2 := c.Resume(s.id(), false)
		return errors.Join(err, err2, c.Clear(s.id()))
	}
	now, info, err = c.Table(s.id())
	if err == nil {
		err = still(now)
	}
	if err != nil || !info.Inactive { // changed, or our table was cleared, in between
		clearErr := c.Clear(s.id())
		_, err2 := c.Resume(s.id(), false)
		if err == nil {
			err = fmt.Errorf("%s: %w", s.Name, ErrReplaced)
		}
		return errors.Join(err, clearErr, err2)
	}
	if _, err := c.Resume(s.id(), false); err != nil {
		// The new table does not fit: the old one goes on.
		clearErr := c.Clear(s.id())
		_, err2 := c.Resume(s.id(), false)
		return errors.Join(err, clearErr, err2)
	}
	now, _, err = c.Table(s.id())
	if err != nil {
		return err
	}
	if now.Digest() != table.Digest() {
		return fmt.Errorf("%s: %w at the same moment", s.Name, ErrReplaced)
	}
	return nil
}
