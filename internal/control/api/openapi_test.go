package api

import (
	"encoding"
	"encoding/json"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"tidemark/internal/health"
)

type document struct {
	Paths      map[string]map[string]json.RawMessage
	Components struct {
		Schemas map[string]schema
	}
}

type schema struct {
	Type       string
	Ref        string `json:"$ref"`
	Enum       []string
	Properties map[string]schema
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
		"Bookmark": reflect.TypeFor[Bookmark](), "LiveDisk": reflect.TypeFor[LiveDisk](), "MarkGroupsRequest": reflect.TypeFor[MarkGroupsRequest](), "GroupStats": reflect.TypeFor[GroupStats](), "ModeMove": reflect.TypeFor[ModeMove](), "BookmarkCounts": reflect.TypeFor[BookmarkCounts](), "LastBookmark": reflect.TypeFor[LastBookmark](),
		"Latency": reflect.TypeFor[Latency](), "Totals": reflect.TypeFor[Totals](), "Mark": reflect.TypeFor[Mark](), "MarkedGroup": reflect.TypeFor[MarkedGroup](), "Condition": reflect.TypeFor[health.Condition](),
		"Device": reflect.TypeFor[Device](), "Filter": reflect.TypeFor[Filter](), "DeviceRequest": reflect.TypeFor[DeviceRequest](),
		"ResizeRequest": reflect.TypeFor[ResizeRequest](), "FilterRequest": reflect.TypeFor[FilterRequest](), "SpliceRequest": reflect.TypeFor[SpliceRequest](), "ChangeMap": reflect.TypeFor[ChangeMap](), "ByteRange": reflect.TypeFor[ByteRange](),
		"ChangesRequest": reflect.TypeFor[ChangesRequest](), "MarkRequest": reflect.TypeFor[MarkRequest](),
		"Snapshot": reflect.TypeFor[Snapshot](), "SnapshotDevice": reflect.TypeFor[SnapshotDevice](), "SnapshotStorage": reflect.TypeFor[SnapshotStorage](),
		"StorageSpec": reflect.TypeFor[StorageSpec](), "SnapshotRequest": reflect.TypeFor[SnapshotRequest](), "SnapshotEvent": reflect.TypeFor[SnapshotEvent](),
		"Copying": reflect.TypeFor[Copying](), "CopyRequest": reflect.TypeFor[CopyRequest](), "SnapshotCopy": reflect.TypeFor[SnapshotCopy](), "CopiedDevice": reflect.TypeFor[CopiedDevice](),
		"Consumer": reflect.TypeFor[Consumer](), "DrainRequest": reflect.TypeFor[DrainRequest](), "DrainCommit": reflect.TypeFor[DrainCommit](),
		"DrainWait": reflect.TypeFor[DrainWait](), "DrainPending": reflect.TypeFor[DrainPending](), "DrainClear": reflect.TypeFor[DrainClear](),
	}
	for name := range doc.Components.Schemas {
		if _, ok := types[name]; !ok && !slices.Contains([]string{"Error", "Changes"}, name) { // an envelope, and one with another type in it
			t.Errorf("schema %s is no type of this package", name)
		}
	}
	for name, typ := range types {
		var want, got []string
		for i := range typ.NumField() {
			field, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			want = append(want, field)
			if has, is := doc.Components.Schemas[name].Properties[field], kind(typ.Field(i).Type); has.Type != is && has.Ref == "" {
				t.Errorf("schema %s: %s is a %s, described as %q", name, field, is, has.Type)
			}
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

// kind is how a value of a Go type looks in JSON.
func kind(t reflect.Type) string {
	if t.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
		return "string"
	}
	if t.Kind() == reflect.Pointer { // it may be absent
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "boolean"
	case reflect.Float64:
		return "number"
	case reflect.Slice:
		return "array"
	case reflect.Struct, reflect.Map:
		return "object"
	}
	return "integer"
}

// TestOpenAPIErrorCodes: a client finds every code that it may be given.
func TestOpenAPIErrorCodes(t *testing.T) {
	var doc document
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	described := slices.Sorted(slices.Values(doc.Components.Schemas["Error"].Properties["error"].Properties["code"].Enum))
	var given []string
	for code := range httpStatus {
		given = append(given, string(code))
	}
	slices.Sort(given)
	if !slices.Equal(described, given) {
		t.Errorf("described are\n%q\nbut given are\n%q", described, given)
	}
}

// TestOpenAPIReferences: what the description refers to is in it.
func TestOpenAPIReferences(t *testing.T) {
	var doc document
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	refs := regexp.MustCompile(`"#/components/schemas/(\w+)"`).FindAllSubmatch(openAPI, -1)
	for _, m := range refs {
		if _, ok := doc.Components.Schemas[string(m[1])]; !ok {
			t.Errorf("schema %s is referred to and not described", m[1])
		}
	}
	if len(refs) == 0 {
		t.Error("no reference was found: this test no longer sees them")
	}
}
