package daemon

import (
	"testing"

	"tidemark/internal/cbt"
	"tidemark/internal/snapshot"
)

// TestTrackedAs: what a program notes together with an image must never let it
// miss a change, whichever of the held images it means.
func TestTrackedAs(t *testing.T) {
	const size = 1 << 20
	m := cbt.New(size)
	held := func(taken ...*cbt.Changes) (out []snapshot.DeviceInfo) {
		for _, c := range taken {
			out = append(out, snapshot.DeviceInfo{Generation: c.Info().Generation.String(), Number: c.Info().Number})
		}
		return out
	}
	is := func(what string, held []snapshot.DeviceInfo, g cbt.Generation, number uint8) {
		t.Helper()
		if gotG, got := trackedAs(m.Info(), held); gotG != g || got != number {
			t.Errorf("%s: %s:%d, want %s:%d", what, gotG, got, g, number)
		}
	}
	g := m.Info().Generation
	is("none was taken", nil, g, 0)
	first := m.Take()
	is("one", held(first), g, 1)
	second := m.Take()
	is("two are held", held(first, second), g, 1)
	is("the older is gone", held(second), g, 2)
	is("none is held", nil, g, 2)

	m.Reset() // as when the daemon is killed
	strange, _ := trackedAs(m.Info(), held(first, second))
	third := m.Take()
	stranger, _ := trackedAs(m.Info(), held(second, third))
	if strange == g || strange == m.Info().Generation || stranger == m.Info().Generation || strange == stranger {
		t.Errorf("images of a generation that has ended may be continued: %s, %s of %s and %s", strange, stranger, g, m.Info().Generation)
	}
	if again, _ := trackedAs(m.Info(), held(third, second)); again != stranger {
		t.Error("asked twice it is another one")
	}
	is("the old ones are gone", held(third), m.Info().Generation, 1)
}
