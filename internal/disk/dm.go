package disk

import "tidemark/internal/dm"

// Mapping is what device-mapper does behind a device.
type Mapping struct {
	Name    string   `json:"name"`
	UUID    string   `json:"uuid,omitempty"`
	Targets []string `json:"targets,omitempty"` // distinct types of the live table; none: it could not be read
	Table   string   `json:"table,omitempty"`   // digest of the live table; "" where it could not be read
	Event   uint32   `json:"event"`
}

func (h Host) mapping(whole string, dev uint32) *Mapping {
	m := &Mapping{Name: h.attr(whole, "dm/name"), UUID: h.attr(whole, "dm/uuid")}
	if !h.live() {
		return m
	}
	c, err := dm.Open()
	if err != nil {
		return m // a kernel without the control node: what sysfs says must do
	}
	defer c.Close()
	t, info, err := c.Table(dm.Numbered(dev>>20, dev&0xfffff))
	if err == nil {
		m.Targets, m.Table, m.Event = t.Types(), t.Digest(), info.Event
	}
	return m
}
