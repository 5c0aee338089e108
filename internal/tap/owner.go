package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// ownerName is the link, beside the pins of a group, to the state folder of
// the daemon that it belongs to. It lives and goes with the pins.
const ownerName = "state"

// SetOwner notes whose tap a pinned one is: state is its daemon's state folder, absolute.
func SetOwner(instance, group, state string) error {
	p, err := pinsOf(instance, group)
	if err != nil {
		return err
	}
	old, err := os.Readlink(p.path(ownerName))
	if err == nil && old == state {
		return nil
	}
	if err == nil {
		err = os.Remove(p.path(ownerName)) // the folder was moved
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = os.Symlink(state, p.path(ownerName))
	}
	if err != nil {
		return fmt.Errorf("noting whose tap it is: %w", err)
	}
	return nil
}

// Owner is the state folder of the daemon that a pinned tap belongs to, empty
// where none was noted.
func Owner(instance, group string) string {
	p, err := pinsOf(instance, group)
	if err != nil {
		return ""
	}
	state, err := os.Readlink(p.path(ownerName))
	if err != nil {
		return ""
	}
	return state
}
