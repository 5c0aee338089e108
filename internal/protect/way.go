package protect

import (
	"io"

	"tidemark/internal/disk"
	"tidemark/internal/source"
)

// The ways in, as status names them.
const (
	WayTap   = "tap"
	WayServe = "serve"
)

// wayIn is how a group gets at its disks: by a tap on live ones (tapped), or by
// the capture filter of devices that Tidemark serves itself (served). It belongs
// to one session.
type wayIn interface {
	// find gives the disks as they are now. ErrOffline: one is not there, or not as it was.
	find() ([]target, error)
	// adopt gives the source that was at work before this session, nil where there
	// is none of use; fits says whether it is of these very disks. An error is one
	// that waiting may mend.
	adopt(disks []target) (src source.Source, fits bool, err error)
	// renew begins a new source, and removes what was there before.
	renew(disks []target) (source.Source, error)
	// stranded gives the source while disks are not there, if its ring holds
	// anything; nil otherwise.
	stranded() source.Source
	// gone has the next session find the disks changed, should they come back to
	// the source that there is.
	gone() error
	// discard ends the source, if there is one. What its ring holds is lost.
	discard() error
}

// target is one disk of a group, as its way in sees it.
type target interface {
	identity() disk.Identity
	// node is what people call it now.
	node() string
	// open gives what fills read: the disk as it is below the capture.
	open() (reader, error)
	// look says whether the disk is still what it was. changed: it is, with a
	// content that nobody knows. ErrOffline: another source is needed, or it is gone.
	look() (changed string, err error)
	// fingerprint stays the same, within one boot, as long as only writes change the disk.
	fingerprint() string
	// mounts are where file systems on it are mounted. ErrNotFrozen: that cannot be told.
	mounts() ([]string, error)
	// told takes what the kernel tells of a block device; ours: it is this one.
	told(e disk.Uevent) (ours bool)
}

// counted is a target of which the kernel counts what was written to it.
type counted interface {
	written() int64 // bytes that ended, of the whole disk; -1: not known
	still() bool    // nothing is on its way
}

// vouched is a target that can say, at no cost, that nothing was written past the
// source until now.
type vouched interface{ vouch() error }

// reader is what fills and comparisons read a disk by.
type reader interface {
	io.ReaderAt
	io.Closer
}

// wayIn gives the group's own.
func (c *Config) wayIn(env *Env) wayIn {
	if c.Served() {
		return &served{env: env, cfg: c}
	}
	return &tapped{env: env, cfg: c}
}

// Served says that the group is of devices that Tidemark serves.
func (c *Config) Served() bool { return len(c.Disks) > 0 && c.Disks[0].Served != "" }
