package nbdk

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// kernel is the kernel's NBD client as this package commands it.
type kernel interface {
	// send has it do a command; a connect gives the device's number.
	send(ctx context.Context, what uint8, c command) (index int, err error)
	// backends gives the identity that each device was connected with, by number.
	backends() (map[int]string, error)
	// setLook says after how long it looks after a request. NBD's own time-out
	// stays off: it would cut off a server that is merely slow.
	setLook(index int, after time.Duration) error
	// inUse says who uses a device; nobody is "".
	inUse(index int) (user string, err error)
}

// genl is the real one.
type genl struct{}

func (genl) backends() (map[int]string, error) {
	paths, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		return nil, err
	}
	all := map[int]string{}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it goes this moment
		}
		if index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(path)), "nbd")); err == nil {
			all[index] = strings.TrimSpace(string(raw))
		}
	}
	return all, nil
}

func (genl) setLook(index int, after time.Duration) error {
	path := fmt.Sprintf("/sys/block/nbd%d/queue/io_timeout", index)
	if err := os.WriteFile(path, []byte(strconv.FormatInt(after.Milliseconds(), 10)), 0); err != nil {
		return fmt.Errorf("how long the kernel waits before it sends a request again: %w", err)
	}
	return nil
}
