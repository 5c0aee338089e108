package nbdk

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// inUse says who uses a device or a partition of it; nobody is "". It opens
// nothing: the kernel could begin to look for partitions then, and a process that waits for
// a device that it serves itself cannot even be killed.
func (genl) inUse(index int) (user string, err error) {
	dir := fmt.Sprintf("/sys/block/nbd%d", index)
	numbers := map[string]bool{}
	parts, _ := filepath.Glob(dir + "/nbd*/dev")
	for _, path := range append(parts, dir+"/dev") {
		raw, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		numbers[strings.TrimSpace(string(raw))] = true
		if holders, _ := os.ReadDir(filepath.Join(filepath.Dir(path), "holders")); len(holders) > 0 {
			return holders[0].Name() + " lies on it", nil
		}
	}
	if user, err = mounted(numbers); user != "" || err != nil {
		return user, err
	}
	return opened(numbers)
}

func mounted(numbers map[string]bool) (user string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && numbers[fields[2]] {
			return "mounted at " + fields[4], nil
		}
	}
	return "", lines.Err()
}

// opened looks through the open files of all processes. Only what lies below
// /dev is looked at more closely: to look elsewhere could mean to wait for a file system of our own.
func opened(numbers map[string]bool) (user string, err error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return "", err
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, "/dev/") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(link, &st); err != nil {
			continue // closed this moment
		}
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && numbers[fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))] {
			return "open in process " + strings.Split(link, "/")[2], nil
		}
	}
	return "", nil
}
