package doctor

import (
	"strings"
	"testing"

	"tidemark/internal/disk"
)

func TestServeWay(t *testing.T) {
	free := &disk.Info{Name: "sdx"}
	for _, c := range []struct {
		name   string
		info   *disk.Info
		have   []string
		answer Answer
		says   string
	}{
		{"ublk", free, []string{"ublk"}, Yes, ""},
		{"kernel NBD", free, []string{"nbd", "fuse", "loop"}, Yes, ""},
		{"loop", free, []string{"fuse", "loop"}, Yes, "cannot outlive the daemon"},
		{"half of loop", free, []string{"fuse"}, Yes, "NBD clients only"},
		{"nothing", free, nil, Yes, "NBD clients only"},
		{"mounted", &disk.Info{Mounts: []disk.Mount{{Point: "/srv"}}}, []string{"ublk"}, No, "mounted at /srv"},
		{"swap", &disk.Info{Swap: []string{"/dev/sdx"}}, []string{"ublk"}, No, "swap"},
		{"below another", &disk.Info{Holders: []string{"dm-3"}}, []string{"ublk"}, No, "below dm-3"},
	} {
		var checks []Check
		for _, code := range c.have {
			checks = append(checks, Check{Code: code, Answer: Yes})
		}
		w := serveWay(c.info, checks)
		if w.Answer != c.answer || !strings.Contains(w.Reason, c.says) || (w.Reason == "") != (c.says == "") || (w.Remedy == "") != (c.says == "") {
			t.Errorf("%s: %+v, want %v because %q", c.name, w, c.answer, c.says)
		}
	}
}

func TestSpliceWay(t *testing.T) {
	for _, c := range []struct {
		name    string
		mapping *disk.Mapping
		have    string
		answer  Answer
		says    string
		instead string
	}{
		{"disk", nil, "ublk", No, "no device-mapper device", "use the tap"},
		{"unread", &disk.Mapping{}, "ublk", CannotTell, "cannot be read", "root"},
		{"volume", &disk.Mapping{Targets: []string{"linear"}}, "nbd", Yes, "", ""},
		{"crypt", &disk.Mapping{Targets: []string{"crypt", "striped"}}, "ublk", Yes, "", ""},
		{"no front", &disk.Mapping{Targets: []string{"linear"}}, "loop", No, "no front that outlives", "modprobe ublk_drv"},
		{"thin", &disk.Mapping{Targets: []string{"linear", "thin"}}, "ublk", No, "type thin: a thin volume's blocks belong to its pool", "use the tap"},
		{"paths", &disk.Mapping{Targets: []string{"multipath"}}, "ublk", No, "type multipath: ", "splice the volume above"},
	} {
		w := spliceWay(&disk.Info{Name: "dm-0", Mapping: c.mapping}, []Check{{Code: c.have, Answer: Yes}})
		if w.Answer != c.answer || !strings.Contains(w.Reason, c.says) || (w.Reason == "") != (c.says == "") ||
			!strings.Contains(w.Remedy, c.instead) || (w.Remedy == "") != (c.instead == "") {
			t.Errorf("%s: %+v", c.name, w)
		}
	}
}
