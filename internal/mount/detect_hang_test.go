package mount

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestLookFor: a disk that hangs keeps nobody waiting, and is not taken for one
// that holds something else.
func TestLookFor(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	read := func(dev string) (string, error) {
		switch dev {
		case "hangs":
			<-hang
		case "broken":
			return "wanted", errors.New("broken")
		}
		return dev, nil
	}
	for _, c := range []struct {
		devs []string
		want string // in the error; "": none
	}{
		{nil, ""}, {[]string{"a", "b", "broken"}, ""}, {[]string{"a", "wanted"}, "it is on wanted"},
		{[]string{"a", "hangs"}, "hangs has not answered"}, {[]string{"hangs", "wanted"}, "it is on wanted"},
	} {
		err := lookFor("wanted", c.devs, read, 300*time.Millisecond)
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrSameFS) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%v: %v", c.devs, err)
		}
	}
}
