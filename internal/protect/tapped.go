package protect

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
	"tidemark/internal/source"
	"tidemark/internal/tap"
)

// tapped is the way in to live disks: eBPF programs that outlive the daemon.
type tapped struct {
	env *Env
	cfg *Config
}

// tappedDisk is a disk at the newest look.
type tappedDisk struct {
	*disk.Info
	cfg DiskConfig
}

// find looks the group's disks up under the names they have now.
func (w *tapped) find() ([]target, error) {
	var out []target
	for _, d := range w.cfg.Disks {
		i, err := find(d)
		if err != nil {
			return nil, err
		}
		if i.Size != d.Size {
			return nil, fmt.Errorf("disk %s has %d bytes and had %d when it was protected: unprotect the group and protect it again: %w", d.Name, i.Size, d.Size, ErrOffline)
		}
		out = append(out, &tappedDisk{i, d})
	}
	return out, nil
}

// Where gives the path of a group's disk: the one that it was protected by, or
// another, as after a start of the machine; "" where that path is another disk's
// now, and this one is not there.
func Where(d DiskConfig) string {
	if d.Served != "" {
		return d.Path
	}
	if i, err := find(d); err == nil {
		return i.Path
	}
	if i, err := disk.Inspect(d.Path); err == nil && i.Size > 0 {
		return ""
	}
	return d.Path
}

func find(d DiskConfig) (*disk.Info, error) {
	if i, err := disk.Inspect(d.Path); err == nil {
		if sameDisk(d.Identity, i.Identity) {
			return i, nil
		}
		resized := i.Identity
		resized.Size = d.Identity.Size
		if i.Size > 0 && sameDisk(d.Identity, resized) {
			return i, nil // tapped.find says what it is about its size
		}
	}
	names, err := os.ReadDir("/sys/class/block")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		i, err := disk.Inspect("/dev/" + strings.ReplaceAll(n.Name(), "!", "/"))
		if err != nil {
			continue // without medium, or gone
		}
		if sameDisk(d.Identity, i.Identity) {
			return i, nil
		}
	}
	return nil, fmt.Errorf("disk %s (%s) is not on this machine: %w", d.Name, d.Identity, ErrOffline)
}

// adopt takes the pinned tap over.
func (w *tapped) adopt(disks []target) (source.Source, bool, error) {
	t, err := tap.Adopt(w.env.Instance, w.cfg.Name)
	switch {
	case err == nil && slices.Equal(t.Targets(), w.targets(disks)):
		return t, true, tap.SetOwner(w.env.Instance, w.cfg.Name, w.env.StateDir)
	case err == nil:
		return t, false, nil
	case passing(err):
		return nil, false, err // its ring may hold what is nowhere else
	case !errors.Is(err, tap.ErrNoPins):
		w.env.Log.Warn("the pinned tap cannot be taken over", "group", w.cfg.Name, "error", err)
	}
	return nil, false, nil
}

func (w *tapped) renew(disks []target) (source.Source, error) {
	settings, err := w.cfg.Settings.withDefaults()
	if err == nil {
		err = w.discard()
	}
	if err != nil {
		return nil, err
	}
	t, err := tap.Start(tap.Config{Instance: w.env.Instance, Group: w.cfg.Name, RingBytes: settings.RingBytes, Targets: w.targets(disks),
		Options: tap.Options{MetadataOnly: settings.Metadata}})
	if err != nil {
		return nil, err
	}
	if err := tap.SetOwner(w.env.Instance, w.cfg.Name, w.env.StateDir); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (w *tapped) stranded() source.Source {
	waits, err := tap.Waiting(w.env.Instance, w.cfg.Name)
	if err != nil || waits == 0 {
		return nil // no tap, or none that can be read: what became of it is seen when the disks are back
	}
	t, err := tap.Adopt(w.env.Instance, w.cfg.Name)
	if err != nil {
		return nil
	}
	return t
}

func (w *tapped) gone() error {
	err := tap.SetNote(w.env.Instance, w.cfg.Name, "gone")
	if errors.Is(err, tap.ErrNoPins) || errors.Is(err, tap.ErrLayout) {
		return nil // there will be another tap
	}
	return err
}

func (w *tapped) discard() error { return tap.Discard(w.env.Instance, w.cfg.Name) }

func (w *tapped) targets(disks []target) []tap.Target {
	var out []tap.Target
	for _, t := range disks {
		d := t.(*tappedDisk) // find made it
		out = append(out, tap.Target{Name: d.cfg.Name, Whole: d.WholeDev, Start: d.Start, Len: d.Size, DiskSeq: d.DiskSeq,
			BlockSize: d.cfg.BlockSize, BioBased: d.BioBased, Pass: passthrough(d.Info, w.env.Log)})
	}
	return out
}

// passthrough says how to tell the commands that a disk gets past the block layer.
func passthrough(d *disk.Info, log *slog.Logger) tap.Passthrough {
	var kind uint32
	switch d.Kind {
	case disk.Loop, disk.DM, disk.MD, disk.Zram, disk.Brd, disk.Pmem, disk.NBD, disk.Ublk:
		return tap.Passthrough{Kind: tap.PassNone}
	case disk.SCSI:
		kind = tap.PassSCSI
	case disk.NVMe:
		kind = tap.PassNVMe
	default:
		return tap.Passthrough{Kind: tap.PassUnknown}
	}
	p, err := tap.FindPassthrough(kind)
	if err != nil {
		log.Warn("commands past the block layer cannot be told apart: each that sends data counts as a write", "disk", d.Name, "error", err)
	}
	return p
}

// passing says whether an error tells of a lack that waiting may mend.
func passing(err error) bool {
	for _, e := range []error{unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.EAGAIN, unix.EINTR, unix.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (d *tappedDisk) identity() disk.Identity { return d.Identity }

func (d *tappedDisk) node() string { return d.Path }

// open opens a disk for reading beside its page cache: a mounted file system's
// writes go past that cache, and what it holds may be old.
func (d *tappedDisk) open() (reader, error) {
	return os.OpenFile(d.Path, os.O_RDONLY|syscall.O_DIRECT, 0)
}

func (d *tappedDisk) look() (string, error) {
	was, name := d.Info, d.cfg.Name
	is, err := disk.Glance(was.Path) // reads nothing: a disk may sleep, or hang
	if err != nil {
		return "", fmt.Errorf("disk %s is gone: %w: %w", name, err, ErrOffline)
	}
	changed := disk.Changed(was, is)
	if len(changed) == 0 {
		return "", nil
	}
	what := fmt.Sprintf("disk %s: %s", name, strings.Join(changed, ", "))
	if is.Dev != was.Dev || is.Size != was.Size || is.Start != was.Start || is.DiskSeq != was.DiskSeq {
		return "", fmt.Errorf("%s: %w", what, ErrOffline) // another tap is needed
	}
	d.Info = is
	return what, nil
}

func (d *tappedDisk) fingerprint() string { return d.Fingerprint() }

func (d *tappedDisk) mounts() ([]string, error) {
	i, err := find(d.cfg)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range i.Mounts {
		out = append(out, m.Point)
	}
	return out, nil
}

func (d *tappedDisk) told(e disk.Uevent) bool {
	return e.Name == "" || e.Name == d.Name || e.Name == d.Whole
}

func (d *tappedDisk) written() int64 {
	written, discarded, ok, err := disk.Stat(d.Info)
	if err != nil || !ok || d.BioBased {
		return -1
	}
	return int64(written + discarded)
}

func (d *tappedDisk) still() bool {
	r, w, err := disk.InFlight(d.Info)
	return err == nil && r+w == 0
}
