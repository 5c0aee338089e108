package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// recorded lays a recorded machine out in a folder. Its file "links" lists
// symbolic links, which txtar cannot hold.
func recorded(t *testing.T, name string) Host {
	t.Helper()
	a, err := txtar.ParseFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	put := func(path string, make func(path string) error) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range a.Files {
		if f.Name != "links" {
			put(f.Name, func(p string) error { return os.WriteFile(p, f.Data, 0o600) })
			continue
		}
		for line := range strings.Lines(string(f.Data)) {
			from, to, _ := strings.Cut(strings.TrimSpace(line), " ")
			put(from, func(p string) error { return os.Symlink(to, p) })
		}
	}
	return Host{Root: root}
}

func see(t *testing.T, h Host, spec string) *Info {
	t.Helper()
	i, err := h.Inspect(spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func nodeNames(nodes []Node) string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return strings.Join(out, " ")
}

func points(i *Info) string {
	var out []string
	for _, m := range i.Mounts {
		out = append(out, m.Point)
	}
	return strings.Join(out, " ")
}

func TestRecordedStacks(t *testing.T) {
	h := recorded(t, "server.txtar")
	for _, c := range []struct{ spec, above, below, mounts, holders string }{
		{"sda", "loop0 dm-0 dm-1", "", "/ /boot/efi /mnt/image", "dm-0 dm-1"},
		{"sda1", "", "", "/boot/efi", ""},
		{"8:3", "loop0 dm-0 dm-1", "", "/ /mnt/image", "dm-0 dm-1"},
		{"dm-0", "loop0", "sda3", "/ /mnt/image", ""},
		{"dm-1", "", "sda3", "", ""},
		{"loop0", "", "sda3 dm-0", "/mnt/image", ""},
		{"sdb", "dm-2", "", "/srv", "dm-2"},
		{"md0", "", "sdd sde", "/shared", ""},
		{"sdi", "", "", "/pool", ""},
	} {
		i := see(t, h, c.spec)
		if got := nodeNames(i.Stack.Above); got != c.above {
			t.Errorf("above %s: %s, want %s", c.spec, got, c.above)
		}
		if got := nodeNames(i.Stack.Below); got != c.below {
			t.Errorf("below %s: %s, want %s", c.spec, got, c.below)
		}
		if got := points(i); got != c.mounts {
			t.Errorf("mounts of %s: %s, want %s", c.spec, got, c.mounts)
		}
		if got := strings.Join(i.Holders, " "); got != c.holders {
			t.Errorf("holders of %s: %s, want %s", c.spec, got, c.holders)
		}
	}
}

func TestRecordedRelations(t *testing.T) {
	h := recorded(t, "server.txtar")
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"sda", "sda", true}, {"sda", "sda1", true}, {"sda1", "sda2", false}, {"sda", "dm-0", true}, {"sda1", "dm-0", false}, {"sda3", "dm-0", true},
		{"dm-0", "dm-1", false}, {"loop0", "sda", true}, {"loop0", "dm-0", true}, {"loop0", "dm-1", false}, {"sdb", "sdc", false}, {"sdb", "dm-2", true}, {"sda", "sdb", false},
	} {
		a, b := see(t, h, c.a), see(t, h, c.b)
		if Related(a, b) != c.want || Related(b, a) != c.want {
			t.Errorf("%s and %s related: %v, want %v", c.a, c.b, !c.want, c.want)
		}
	}
	for _, c := range []struct{ name, holds, not string }{
		{"sda", "/var/x /mnt/image/x /boot/efi/x", "/srv/x /tmp/x /pool/x"},
		{"sda3", "/ /mnt/image/x", "/boot/efi"},
		{"dm-1", "", "/ /mnt/image"},
		{"sdb", "/srv /merged/vault", "/"},
		{"sde", "/shared/a", "/"},
		{"sdh", "/pool/vault", "/"},
		{"sdi", "/pool/vault", "/"},
	} {
		i := see(t, h, c.name)
		for _, p := range strings.Fields(c.holds) {
			if !Holds(i, p) {
				t.Errorf("%s holds %s, and nobody says so", c.name, p)
			}
		}
		for _, p := range strings.Fields(c.not) {
			if Holds(i, p) {
				t.Errorf("%s does not hold %s", c.name, p)
			}
		}
	}
}

func TestRecordedRefusals(t *testing.T) {
	h := recorded(t, "server.txtar")
	for name, want := range map[string][]string{
		"sda":     {CodeMember, CodeMember, CodeSwap},
		"sda1":    nil,
		"sda2":    {CodeSwap},
		"sda3":    {CodeMember, CodeMember},
		"dm-0":    nil,
		"dm-2":    nil,
		"sdb":     {CodeMultipath},
		"sdd":     {CodeMember, CodeCluster},
		"md0":     {CodeCluster},
		"sdf":     {CodeEncryption},
		"sdg":     {CodeEncryption},
		"sdj":     {CodeSwap}, // read-only is no reason
		"nvme0n1": {CodeZoned},
	} {
		got := codes(TapRefusals(see(t, h, name)))
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if got := codes(TapRefusals(see(t, h, "pmem0"))); !slices.Contains(got, CodeDAX) {
		t.Errorf("pmem0: %v", got)
	}
	i := see(t, h, "dm-1")
	i.Mapping.Targets = []string{"snapshot-merge"}
	if got := codes(TapRefusals(i)); !slices.Equal(got, []string{CodeMerge}) {
		t.Errorf("merging: %v", got)
	}
	i = see(t, h, "sda1")
	i.hidden, i.Size = true, 0
	if got := codes(TapRefusals(i)); !slices.Equal(got, []string{CodeEmpty, CodeHidden}) {
		t.Errorf("hidden and empty: %v", got)
	}
	if c := HoldsRefusal(see(t, h, "sdb"), "", "/srv/vault"); c == nil || c.Code != CodeHoldsOwn || !strings.Contains(c.Detail, "/srv/vault") {
		t.Errorf("the vault's own disk: %+v", c)
	}
	if c := HoldsRefusal(see(t, h, "sdb"), "", "/var/vault"); c != nil {
		t.Errorf("another disk than the vault's: %+v", c)
	}
	for _, code := range []string{CodeMember, CodeSwap, CodeHoldsOwn, CodeZoned} {
		if Forceable(code) || !Forceable(CodeCluster) {
			t.Errorf("forceable: %s %v", code, Forceable(code))
		}
	}
}

func TestRecordedFacts(t *testing.T) {
	h := recorded(t, "server.txtar")
	sda, sda1, dm := see(t, h, "/dev/sda"), see(t, h, "PARTUUID=0a0a0a0a-01"), see(t, h, "dm-0")
	if sda.LogicalSector != 512 || sda.PhysicalSector != 4096 || sda.DiskSeq != 3 || sda.Kind != SCSI || sda.BioBased {
		t.Errorf("%+v", sda)
	}
	if sda1.Name != "sda1" || sda1.WholeDev != 8<<20 || sda1.Start != 1<<20 || sda1.Size != 100<<20 || !sda1.Partition || sda1.DiskSeq != 3 {
		t.Errorf("%+v", sda1)
	}
	if got, want := fmt.Sprintf("%+v", sda1.Identity), "partuuid:0a0a0a0a-01"; got != want || sda1.Identity.ByID != "wwid:t10.ATA_DISK_1000_SN0001" {
		t.Errorf("%s by %s", got, sda1.Identity.ByID)
	}
	if dm.Kind != DM || !dm.BioBased || dm.Identity.DMUUID != "LVM-aaaabbbb" || see(t, h, "dm-2").BioBased {
		t.Errorf("%+v", dm)
	}
	w, d, on, err := Stat(sda1)
	if w != 16000*512 || d != 2048*512 || !on || err != nil {
		t.Errorf("written %d, discarded %d, %v, %v", w, d, on, err)
	}
	if r, w, err := InFlight(sda); r != 1 || w != 2 || err != nil {
		t.Errorf("in flight %d %d, %v", r, w, err)
	}
}
