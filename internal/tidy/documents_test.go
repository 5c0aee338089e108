package tidy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// named is a path in a document, with the name of something in that file behind a colon.
var named = regexp.MustCompile("(?:`|\\]\\()((?:bpf|internal|cmd|test|docs)/[\\w./-]*\\w)(?::([\\w.]+))?(?:`|\\))")

// TestDocumentsPointAtWhatExists: every path that a document names is there, and so is what it names in it.
func TestDocumentsPointAtWhatExists(t *testing.T) {
	found := 0
	for _, document := range []string{"README.md", "ARCHITECTURE.md", "CHANGELOG.md", "docs/operating.md"} {
		text, err := os.ReadFile(filepath.Join(root, document))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			found++
			path, what := filepath.Join(root, m[1]), m[2]
			st, err := os.Stat(path)
			if err != nil {
				t.Errorf("%s names %s: %v", document, m[1], err)
				continue
			}
			if what == "" || st.IsDir() {
				continue
			}
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			name := what[strings.LastIndex(what, ".")+1:]
			if !regexp.MustCompile(`\b` + name + `\b`).Match(content) {
				t.Errorf("%s names %s in %s, which has no such thing", document, what, m[1])
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d paths were found: this test no longer sees them", found)
	}
}
