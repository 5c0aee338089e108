// Package tidy holds the repository to its own map: who may import whom,
// and that every package says what it is.
package tidy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "tidemark/"
	root   = "../.."
)

// layer lists every package directory with the packages it may import.
// A directory missing here fails the test: adding a package is a decision.
// "x/..." on the right admits x and everything below it.
var layer = map[string][]string{
	// Vocabulary. Standard library only.
	"internal/block":        {},
	"internal/health":       {},
	"internal/abi/ioctl":    {},
	"internal/abi/nbd":      {},
	"internal/abi/ublk":     {"internal/abi/ioctl"},
	"internal/abi/fuse":     {"internal/abi/ioctl"},
	"internal/abi/blksnap":  {"internal/abi/ioctl"},
	"internal/abi/involflt": {"internal/abi/ioctl"},
	"bpf":                   {},

	// One kernel facility each.
	"internal/uring":   {},
	"internal/vfs":     {},
	"internal/loop":    {"internal/block", "internal/abi/ioctl"},
	"internal/dm":      {},
	"internal/disk":    {"internal/block", "internal/dm", "internal/health", "internal/loop"},
	"internal/backing": {"internal/block", "internal/uring"},
	"internal/freeze":  {"internal/block", "internal/disk", "internal/health"},
	"internal/splice":  {"internal/block", "internal/disk", "internal/dm"},

	// The stream, from a write to a view at a point.
	"internal/stream":   {"internal/block"},
	"internal/source":   {"internal/block", "internal/stream"},
	"internal/cbt":      {"internal/block", "internal/vfs"},
	"internal/fill":     {"internal/block", "internal/stream"},
	"internal/tap":      {"internal/block", "internal/cbt", "internal/disk", "internal/health", "internal/loop", "internal/source", "internal/stream", "bpf"},
	"internal/segment":  {"internal/block", "internal/stream"},
	"internal/spool":    {"internal/block", "internal/health", "internal/segment", "internal/stream", "internal/vfs"},
	"internal/vault":    {"internal/block", "internal/health", "internal/segment", "internal/stream", "internal/vfs"},
	"internal/timeline": {"internal/block", "internal/segment", "internal/stream", "internal/vault"},
	"internal/deposit":  {"internal/block", "internal/cbt", "internal/segment", "internal/stream", "internal/timeline", "internal/vault"},
	"internal/batch":    {"internal/block", "internal/stream"},
	"internal/drain":    {"internal/batch", "internal/block", "internal/segment", "internal/stream", "internal/timeline", "internal/vfs"},
	"internal/restore":  {"internal/block", "internal/loop"},

	// Served devices.
	"internal/diff":           {"internal/block", "internal/vfs"},
	"internal/stack":          {"internal/block", "internal/health"},
	"internal/filter/track":   {"internal/block", "internal/cbt", "internal/health", "internal/stack"},
	"internal/filter/cow":     {"internal/block", "internal/diff", "internal/health", "internal/stack"},
	"internal/filter/capture": {"internal/block", "internal/health", "internal/source", "internal/stack", "internal/stream", "internal/vfs"},
	"internal/filter/barrier": {"internal/block", "internal/health", "internal/stack"},
	"internal/filter/delay":   {"internal/block", "internal/health", "internal/stack"},
	"internal/filter/fault":   {"internal/block", "internal/health", "internal/stack"},
	"internal/filter/log":     {"internal/block", "internal/health", "internal/stack"},
	"internal/filter/example": {"internal/block", "internal/health", "internal/stack", "internal/filter/..."},
	"internal/snapshot": {"internal/block", "internal/cbt", "internal/diff", "internal/health", "internal/filter/barrier", "internal/filter/cow",
		"internal/filter/track", "internal/stack", "internal/vfs"},
	"internal/front/ublk": {"internal/block", "internal/abi/ublk", "internal/uring"},
	"internal/front/nbd":  {"internal/block", "internal/abi/nbd"},
	"internal/front/nbdk": {"internal/block", "internal/abi/nbd", "internal/front/nbd"},
	"internal/front/loop": {"internal/block", "internal/loop"},
	"internal/overlay":    {"internal/block"},
	"internal/mount":      {"internal/block", "internal/front/loop", "internal/loop"},
	"internal/serve": {"internal/block", "internal/backing", "internal/cbt", "internal/diff", "internal/disk", "internal/dm", "internal/filter/...", "internal/front/...",
		"internal/freeze", "internal/health", "internal/loop", "internal/snapshot", "internal/splice", "internal/stack", "internal/vfs"},

	// Assembly and the ways to command it.
	"internal/protect": {"internal/block", "internal/cbt", "internal/disk", "internal/fill", "internal/filter/capture", "internal/freeze", "internal/health",
		"internal/restore", "internal/segment", "internal/source", "internal/spool", "internal/stream", "internal/tap", "internal/timeline", "internal/vault", "internal/vfs"},
	"internal/doctor":           {"internal/block", "internal/disk", "internal/dm", "internal/front/...", "internal/health", "internal/loop", "internal/serve", "internal/splice", "internal/tap"},
	"internal/control/api":      {"internal/block", "internal/health", "internal/stream"},
	"internal/control/metrics":  {"internal/block", "internal/control/api", "internal/health"},
	"internal/control/cuse":     {"internal/abi/fuse"},
	"internal/control/blksnap":  {"internal/block", "internal/abi/blksnap", "internal/control/cuse", "internal/health"},
	"internal/control/involflt": {"internal/block", "internal/stream", "internal/abi/involflt", "internal/control/cuse", "internal/health"},
	"internal/daemon":           {"internal/..."},
	"client":                    {"internal/batch", "internal/control/api"},
	"client/example":            {"client"},
	"cmd/tidemark": {"internal/batch", "internal/block", "internal/control/api", "internal/control/metrics", "internal/daemon", "internal/disk", "internal/segment", "internal/tap", "internal/mount", "internal/overlay", "internal/doctor", "internal/freeze", "internal/front/...", "internal/serve",
		"internal/health", "internal/restore", "internal/stream", "internal/timeline", "internal/vault"},

	// Tests. What they need from the rest they take as interfaces, so that any package's own tests can use them.
	"internal/sim":             {"internal/block", "internal/vfs"},
	"internal/sim/story":       {"internal/block", "internal/stream"},
	"internal/testkit":         {"internal/block", "internal/loop"},
	"internal/testkit/program": {"internal/loop", "internal/testkit"},
	"test/bench":               {"client", "internal/..."},
	"test/live":                {"client", "internal/..."},
	"internal/tidy":            {},
	"test/vm":                  {"internal/..."},
	"test/vm/guest":            {"internal/..."},
}

func TestTidy(t *testing.T) {
	seen := map[string]bool{}
	documented := map[string]bool{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".git")) {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		rel, _ := filepath.Rel(root, name)
		dir := path.Dir(filepath.ToSlash(rel))
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		seen[dir] = true
		documented[dir] = documented[dir] || file.Doc != nil
		if ast.IsGenerated(file) {
			return nil
		}
		checkImports(t, rel, dir, file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir := range seen {
		if _, ok := layer[dir]; !ok {
			t.Errorf("%s: not in the layer table; say where it belongs in internal/tidy", dir)
		}
		if !documented[dir] {
			t.Errorf("%s: no package comment", dir)
		}
	}
}

func checkImports(t *testing.T, rel, dir string, file *ast.File) {
	for _, spec := range file.Imports {
		dep, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module)
		if !ours || dep == dir || slices.ContainsFunc(layer[dir], func(rule string) bool { return admits(rule, dep) }) {
			continue
		}
		if strings.HasSuffix(rel, "_test.go") && (dep == "internal/testkit" || dep == "internal/testkit/program" || dep == "internal/sim" || dep == "internal/sim/story" || dep == "internal/loop") {
			continue
		}
		t.Errorf("%s: imports %s, which its layer does not allow", rel, dep)
	}
}

func admits(rule, dep string) bool {
	if prefix, ok := strings.CutSuffix(rule, "/..."); ok {
		return dep == prefix || strings.HasPrefix(dep, prefix+"/")
	}
	return dep == rule
}

// TestLayersAcyclic proves the table itself is a hierarchy.
func TestLayersAcyclic(t *testing.T) {
	const visiting, done = 1, 2
	state := map[string]int{}
	var visit func(dir string, trail []string)
	visit = func(dir string, trail []string) {
		switch state[dir] {
		case done:
			return
		case visiting:
			t.Errorf("cycle: %s", strings.Join(append(trail, dir), " -> "))
			return
		}
		state[dir] = visiting
		for _, rule := range layer[dir] {
			if strings.HasSuffix(rule, "/...") {
				continue // Assembly and tests sit on top of everything.
			}
			for dep := range layer {
				if dep != dir && admits(rule, dep) {
					visit(dep, append(trail, dir))
				}
			}
			if _, ok := layer[rule]; !ok && !strings.HasSuffix(rule, "/...") {
				t.Errorf("%s: unknown package %s", dir, rule)
			}
		}
		state[dir] = done
	}
	for dir := range layer {
		visit(dir, nil)
	}
}
