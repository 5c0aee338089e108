package api

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"tidemark/internal/health"
)

type document struct {
	Paths      map[string]map[string]json.RawMessage
	Components struct {
		Schemas map[string]struct{ Properties map[string]json.RawMessage }
	}
}

// TestOpenAPIRoutes holds the description against the handlers, both ways.
func TestOpenAPIRoutes(t *testing.T) {
	var doc document
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	var described, served []string
	for path, ops := range doc.Paths {
		for method := range ops {
			described = append(described, strings.ToUpper(method)+" "+path)
		}
	}
	for _, r := range routes {
		served = append(served, r.method+" "+strings.Replace(r.path, "...}", "}", 1))
	}
	slices.Sort(described)
	slices.Sort(served)
	if !slices.Equal(described, served) {
		t.Errorf("openapi.json describes\n%q\nbut served are\n%q", described, served)
	}
}

// TestOpenAPISchemas holds every schema's properties against the Go type's JSON fields.
func TestOpenAPISchemas(t *testing.T) {
	var doc document
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	types := map[string]reflect.Type{
		"Status": reflect.TypeFor[Status](), "Group": reflect.TypeFor[Group](), "Disk": reflect.TypeFor[Disk](),
		"ProtectRequest": reflect.TypeFor[ProtectRequest](), "BookmarkRequest": reflect.TypeFor[BookmarkRequest](),
		"Bookmark": reflect.TypeFor[Bookmark](), "LiveDisk": reflect.TypeFor[LiveDisk](), "Condition": reflect.TypeFor[health.Condition](),
		"Device": reflect.TypeFor[Device](), "Filter": reflect.TypeFor[Filter](), "DeviceRequest": reflect.TypeFor[DeviceRequest](),
		"ResizeRequest": reflect.TypeFor[ResizeRequest](), "ChangeMap": reflect.TypeFor[ChangeMap](), "ByteRange": reflect.TypeFor[ByteRange](),
		"ChangesRequest": reflect.TypeFor[ChangesRequest](), "MarkRequest": reflect.TypeFor[MarkRequest](),
	}
	for name, typ := range types {
		var want, got []string
		for i := range typ.NumField() {
			field, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			want = append(want, field)
		}
		for p := range doc.Components.Schemas[name].Properties {
			got = append(got, p)
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(want, got) {
			t.Errorf("schema %s has %q, the type %q", name, got, want)
		}
	}
}
