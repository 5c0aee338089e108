package nbd

import (
	"os"
	"regexp"
	"testing"
)

// TestNetlinkNumbers compares the numbers with the kernel's own header, where
// it is installed: an enumeration begins with its UNSPEC at 0.
func TestNetlinkNumbers(t *testing.T) {
	header, err := os.ReadFile("/usr/include/linux/nbd-netlink.h")
	if err != nil {
		t.Logf("nothing to compare with: %v", err)
		return
	}
	numbers := map[string]int{}
	for _, body := range regexp.MustCompile(`(?s)enum \{(.*?)\}`).FindAllSubmatch(header, -1) {
		for i, name := range regexp.MustCompile(`(?m)^\s*(\w+)`).FindAllSubmatch(body[1], -1) {
			numbers[string(name[1])] = i
		}
	}
	for name, want := range map[string]int{
		"NBD_CMD_CONNECT": GenlConnect, "NBD_CMD_DISCONNECT": GenlDisconnect, "NBD_CMD_RECONFIGURE": GenlReconfigure,
		"NBD_ATTR_INDEX": AttrIndex, "NBD_ATTR_SIZE_BYTES": AttrSizeBytes, "NBD_ATTR_BLOCK_SIZE_BYTES": AttrBlockSizeBytes,
		"NBD_ATTR_TIMEOUT": AttrTimeout, "NBD_ATTR_SERVER_FLAGS": AttrServerFlags, "NBD_ATTR_CLIENT_FLAGS": AttrClientFlags,
		"NBD_ATTR_SOCKETS": AttrSockets, "NBD_ATTR_DEAD_CONN_TIMEOUT": AttrDeadConnTimeout, "NBD_ATTR_BACKEND_IDENTIFIER": AttrBackend,
		"NBD_SOCK_ITEM": AttrSocketItem, "NBD_SOCK_FD": AttrSocketFD,
	} {
		if got, ok := numbers[name]; ok && got != want {
			t.Errorf("%s is %d, not %d", name, got, want)
		} else if !ok {
			t.Logf("the header has no %s", name)
		}
	}
}
