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
