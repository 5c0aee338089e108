package serve

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/health"
)

// incarnation is a disk as long as it is plugged in: its name in sysfs, and the
// number that the kernel gives to each disk that ever appears.
type incarnation struct{ name, seq string }

// incarnationOf is that of a backing, zero where it is a file.
func incarnationOf(path string) incarnation {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return incarnation{}
	}
	link, err := os.Readlink("/sys/dev/block/" + strconv.Itoa(int(unix.Major(st.Rdev))) + ":" + strconv.Itoa(int(unix.Minor(st.Rdev))))
	if err != nil {
		return incarnation{}
	}
	i := incarnation{name: filepath.Base(link)}
	i.seq = i.number()
	return i
}

// number is "" for partitions, before Linux 5.15, and where the disk is gone.
func (i incarnation) number() string {
	text, _ := os.ReadFile("/sys/class/block/" + i.name + "/diskseq") // absent: see above
	return strings.TrimSpace(string(text))
}

// gone: the disk was pulled, or another has its name by now.
func (i incarnation) gone() bool {
	if i.name == "" {
		return false
	}
	_, err := os.Stat("/sys/class/block/" + i.name)
	return os.IsNotExist(err) || i.number() != i.seq
}

// checkBackings ends what stands on disks that are gone: requests fail at once
// instead of one by one, the filters are told, lowest first, and users are told.
func (s *Server) checkBackings() {
	if !s.changes.TryLock() { // the next tick looks again
		return
	}
	defer s.changes.Unlock()
	for _, d := range s.list() {
		if d.stack == nil || d.gone || !d.disk.gone() {
			continue
		}
		d.gone = true
		if err := s.system.Surprise(d.spec.Name); err != nil {
			s.env.Log.Error("ending a device whose disk is gone", "device", d.spec.Name, "error", err)
		}
		s.env.Log.Error("the disk behind a served device is gone", "device", d.spec.Name, "disk", d.disk.name)
		d.health.Raise(health.Condition{Code: "backing-gone", Severity: health.Error, Subject: d.spec.Name,
			Detail: "The disk " + d.spec.Backing + " is gone, and every request fails.",
			Remedy: "Take the device out of use and remove it: tidemark device rm " + d.spec.Name + "; create it again when the disk is back."})
	}
}
