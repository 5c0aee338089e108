package disk

import (
	"os"
	"path/filepath"
	"slices"

	"tidemark/internal/block"
)

// Node is a device in a stack.
type Node struct {
	Name  string `json:"name"`
	Dev   uint32 `json:"dev"` // major<<20|minor
	Whole uint32 `json:"whole_dev"`
	Start int64  `json:"start"` // bytes from the start of the whole disk
	Size  int64  `json:"size"`  // bytes
}

func (n Node) overlaps(o Node) bool {
	return n.Whole == o.Whole && block.Range{Off: n.Start, Len: n.Size}.Overlaps(block.Range{Off: o.Start, Len: o.Size})
}

// Stack is what a device is made of and what is made of it, through
// device-mapper, md and the like, and through loop devices over files.
type Stack struct {
	Above []Node `json:"above,omitempty"` // of the device and of all that shares bytes with it
	Below []Node `json:"below,omitempty"`
}

func (i *Info) node() Node {
	return Node{Name: i.Name, Dev: i.Dev, Whole: i.WholeDev, Start: i.Start, Size: i.Size}
}

// Related says whether two devices share bytes, or one is above the other in a
// stack. Two that only lie on the same third device are not related.
func Related(a, b *Info) bool {
	touches := func(i *Info, n Node) bool {
		return i.node().overlaps(n) || slices.ContainsFunc(i.Stack.Below, n.overlaps)
	}
	return touches(a, b.node()) || touches(b, a.node())
}

// Holds says whether the file or folder at path is stored on the disk, however
// far below. A path that does not exist yet counts as its nearest parent that does.
func Holds(i *Info, path string) bool {
	v, err := i.host.survey()
	if err != nil {
		return true // it cannot be shown that it does not
	}
	for _, name := range v.devicesOfText(i.host.realPath(path)) {
		n := i.host.nodeOf(name)
		if n.overlaps(i.node()) || slices.ContainsFunc(v.below(name), i.node().overlaps) {
			return true
		}
	}
	return false
}

// realPath follows links as far as the path exists.
func (h Host) realPath(path string) string {
	path, err := filepath.Abs(path)
	if err != nil || !h.live() {
		return path
	}
	rest := ""
	for dir := path; ; dir = filepath.Dir(dir) {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			return filepath.Join(real, rest)
		}
		if target, err := os.Readlink(dir); err == nil { // a link to what is not there yet
			if !filepath.IsAbs(target) {
				target = filepath.Join(filepath.Dir(dir), target)
			}
			return filepath.Join(target, rest)
		}
		if dir == "/" {
			return path
		}
		rest = filepath.Join(filepath.Base(dir), rest)
	}
}

func (h Host) nodeOf(name string) Node {
	return Node{Name: name, Dev: h.devOf(name), Whole: h.devOf(h.wholeOf(name)),
		Start: h.number(name, "start") * block.SectorSize, Size: h.number(name, "size") * block.SectorSize}
}

func (v *survey) stack(name string) Stack { return Stack{Above: v.above(name), Below: v.below(name)} }

// below walks down: what a device maps to, a partition's whole disk maps to, a
// loop device's file lies on.
func (v *survey) below(name string) []Node {
	return v.walk([]string{name}, func(n string) []string {
		whole := v.h.wholeOf(n)
		down := append(v.h.list(whole, "slaves"), v.loops[whole]...)
		if whole != n {
			down = append(down, v.h.list(n, "slaves")...)
		}
		return down
	})
}

// above walks up from everything that shares bytes with the device.
func (v *survey) above(name string) []Node {
	base := v.base(name)
	return v.walk(base, func(n string) []string {
		up := v.holders(n)
		for loop, on := range v.loops {
			if slices.Contains(on, n) {
				up = append(up, loop)
			}
		}
		if !slices.Contains(base, n) {
			up = append(up, v.h.partitions(n)...)
		}
		return up
	})
}

// walk collects what next leads to, without the start, sorted by name.
func (v *survey) walk(start []string, next func(string) []string) []Node {
	seen := map[string]bool{}
	for _, s := range start {
		seen[s] = true
	}
	var nodes []Node
	for queue := slices.Clone(start); len(queue) > 0; queue = queue[1:] {
		for _, n := range next(queue[0]) {
			if n != "" && !seen[n] {
				seen[n] = true
				nodes = append(nodes, v.h.nodeOf(n))
				queue = append(queue, n)
			}
		}
	}
	slices.SortFunc(nodes, func(a, b Node) int { return int(int64(a.Dev) - int64(b.Dev)) })
	return nodes
}

// base is the device with all on its disk that shares bytes with it: the
// partitions of a whole disk, the whole disk of a partition.
func (v *survey) base(name string) []string {
	whole := v.h.wholeOf(name)
	self := v.h.nodeOf(name)
	out := []string{name}
	for _, n := range append(v.h.partitions(whole), whole) {
		if n != name && v.h.nodeOf(n).overlaps(self) {
			out = append(out, n)
		}
	}
	return out
}

func (v *survey) holders(name string) []string { return v.h.list(name, "holders") }

// holdersOf is what is stacked directly on the device or on what shares its bytes.
func (v *survey) holdersOf(name string) []string {
	var out []string
	for _, n := range v.base(name) {
		out = append(out, v.holders(n)...)
	}
	return sortedSet(out)
}

// family is the device, what shares its bytes, and what is above them.
func (v *survey) family(name string) []string {
	out := v.base(name)
	for _, n := range v.above(name) {
		out = append(out, n.Name)
	}
	return out
}

func (v *survey) mountsOf(name string) []Mount {
	family := v.family(name)
	var out []Mount
	for _, m := range v.mounts {
		if slices.ContainsFunc(m.Devices, func(d string) bool { return slices.Contains(family, d) }) {
			out = append(out, m)
		}
	}
	return out
}

func (v *survey) swapsOf(name string) []string {
	family := v.family(name)
	var out []string
	for file, on := range v.swaps {
		if slices.ContainsFunc(on, func(d string) bool { return slices.Contains(family, d) }) {
			out = append(out, file)
		}
	}
	return sortedSet(out)
}
