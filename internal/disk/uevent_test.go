package disk

import (
	"strings"
	"testing"
)

// TestUevent: of what the kernel tells, what device-mapper's resumes are and what is not.
func TestUevent(t *testing.T) {
	message := func(fields ...string) []byte { return []byte(strings.Join(fields, "\x00") + "\x00") }
	resume := []string{"change@/devices/virtual/block/dm-3", "ACTION=change", "SUBSYSTEM=block", "DEVNAME=dm-3", "DEVTYPE=disk", "SEQNUM=4711"}
	for name, c := range map[string]struct {
		with []string
		want Uevent
	}{
		"resumed":           {nil, Uevent{Name: "dm-3", Action: "change", Resumed: true, Seq: 4711}},
		"with udev":         {[]string{"DM_COOKIE=6324"}, Uevent{Name: "dm-3", Action: "change", Resumed: true, Seq: 4711}},
		"another size":      {[]string{"RESIZE=1"}, Uevent{Name: "dm-3", Action: "change", Resumed: true, Resized: true, Seq: 4711}},
		"asked for by udev": {[]string{"SYNTH_UUID=0"}, Uevent{Name: "dm-3", Action: "change", Seq: 4711}},
		"a path":            {[]string{"DM_ACTION=PATH_FAILED"}, Uevent{Name: "dm-3", Action: "change", Seq: 4711}},
		"another device":    {[]string{"DEVNAME=/dev/loop3"}, Uevent{Name: "loop3", Action: "change", Seq: 4711}},
		"new":               {[]string{"ACTION=add"}, Uevent{Name: "dm-3", Action: "add", Seq: 4711}},
	} {
		if got, ok := parseUevent(message(append(resume, c.with...)...)); !ok || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, ok, c.want)
		}
	}
	if _, ok := parseUevent(message("ACTION=add", "SUBSYSTEM=net", "SEQNUM=5")); ok {
		t.Error("a network device is taken for a block device")
	}
	if was := Told(); was == 0 {
		t.Error("the kernel's number of its newest event cannot be had")
	}
}
