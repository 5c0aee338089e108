package protect

// Mode is how much of a write is kept at this moment.
type Mode string

const (
	ModeData     Mode = "data"     // range and payload
	ModeMetadata Mode = "metadata" // ranges only
	ModeBitmap   Mode = "bitmap"   // changed blocks only
)

// mode says how much of each write the capture keeps. Nobody chooses it; it
// follows what the tap reports:
//
//	        a write lost its payload,          a write did not even
//	        its range is in the ring           leave its range
//	data ───────────────────────▶ metadata ───────────────────────▶ bitmap
//	 ▲ ▲                             │                                 │
//	 │ └──────── settled ────────────┘                                 │
//	 └─────────────────────── settled ─────────────────────────────────┘
//
// On a machine where payloads cannot be read at all the lowest rung is
// metadata, not data: "settled" leads back there.
type mode struct {
	now   Mode
	floor Mode // data, or metadata where payloads are never captured
	told  *Stats
}

func newMode(payload bool) mode {
	floor := ModeData
	if !payload {
		floor = ModeMetadata
	}
	return mode{now: floor, floor: floor}
}

// modeEvent is what moves a mode.
type modeEvent int

const (
	evRangeOnly modeEvent = iota // a write came without payload
	evDropped                    // writes left nothing but a bit
	evSettled                    // every block is known again
)

// apply is the whole state machine.
func (m *mode) apply(e modeEvent) {
	was := m.now
	switch {
	case e == evSettled:
		m.now = m.floor
	case e == evDropped:
		m.now = ModeBitmap
	case e == evRangeOnly && m.now == ModeData:
		m.now = ModeMetadata
	}
	if m.now != was {
		m.told.moved(m.now, int(e))
	}
}
