package tidy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestConditionsAreDocumented holds the tables of docs/operating.md against the
// health conditions that the code raises, both ways and with their severities.
func TestConditionsAreDocumented(t *testing.T) {
	raised, documented := conditionsRaised(t), conditionsDocumented(t)
	for _, code := range slices.Sorted(maps.Keys(raised)) {
		if have, ok := documented[code]; !ok {
			t.Errorf("%s is raised, and docs/operating.md does not say what to do", code)
		} else if have != raised[code] {
			t.Errorf("%s is of severity %q, documented as %q", code, raised[code], have)
		}
	}
	for _, code := range slices.Sorted(maps.Keys(documented)) {
		if _, ok := raised[code]; !ok {
			t.Errorf("%s is documented, and nothing raises it", code)
		}
	}
	if len(raised) < 10 {
		t.Errorf("only %d conditions were found in the code: this test no longer sees them", len(raised))
	}
}

// conditionsRaised finds every health.Condition literal. Its Code is a string,
// or stands for every constant of its package that begins with Code.
func conditionsRaised(t *testing.T) map[string]string {
	out := map[string]string{}
	err := filepath.WalkDir(filepath.Join(root, "internal"), func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		codes, raises := map[string]string{}, map[string]string{} // constants; code or identifier to severity
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.ValueSpec:
					if len(n.Values) == 1 && strings.HasPrefix(n.Names[0].Name, "Code") {
						codes[n.Names[0].Name] = text(n.Values[0])
					}
				case *ast.CompositeLit:
					if typ, ok := n.Type.(*ast.SelectorExpr); ok && typ.Sel.Name == "Condition" {
						code, severity := codeAndSeverity(n)
						raises[code] = severity
					}
				}
				return true
			})
		}
		for code, severity := range raises {
			switch value, constant := codes[code]; {
			case constant:
				out[value] = severity
			case code == "code": // a parameter: any of the package's
				for _, value := range codes {
					out[value] = severity
				}
			default:
				out[code] = severity
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func codeAndSeverity(lit *ast.CompositeLit) (code, severity string) {
	for _, e := range lit.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		switch key, _ := kv.Key.(*ast.Ident); key.Name {
		case "Code":
			code = text(kv.Value)
		case "Severity":
			severity = strings.ToLower(text(kv.Value))
		}
	}
	return code, severity
}

// text is a string literal's value, or an identifier's last name.
func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return s
		}
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

// conditionsDocumented reads the tables below "## Conditions": code, severity,
// meaning, what to do; the last two must not be empty.
func conditionsDocumented(t *testing.T) map[string]string {
	b, err := os.ReadFile(filepath.Join(root, "docs/operating.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## Conditions\n")
	section, _, _ = strings.Cut(section, "\n## ")
	out := map[string]string{}
	for _, line := range strings.Split(section, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 6 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if cells[3] == "" || cells[4] == "" {
			t.Errorf("%s: no meaning, or nothing said to do", cells[1])
		}
		out[strings.Trim(cells[1], "`")] = cells[2]
	}
	return out
}
