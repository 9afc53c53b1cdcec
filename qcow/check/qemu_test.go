package check_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/test/require"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// qemuReport is what qemu-img check says.
type qemuReport struct {
	Exit        int   `json:"-"` // 0 clean, 1 gave up, 2 corrupt, 3 leaks
	Corruptions int64 `json:"corruptions"`
	Leaks       int64 `json:"leaks"`
	Total       int64 `json:"total-clusters"`
	Allocated   int64 `json:"allocated-clusters"`
	Fragmented  int64 `json:"fragmented-clusters"`
	Compressed  int64 `json:"compressed-clusters"`
	ImageEnd    int64 `json:"image-end-offset"`

	messages string
}

// named returns the arguments that name an image to QEMU's tools.
func named(path, features string) []string {
	options := "driver=qcow2,file.driver=file,file.filename=" + path
	if strings.Contains(features, "luks") {
		options += ",encrypt.format=luks,encrypt.key-secret=s"
	}
	return []string{"--object", "secret,id=s,data=abc123", "--image-opts", options}
}

func qemuCheck(t testing.TB, path, features string) qemuReport {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-img", append([]string{"check", "--output=json"}, named(path, features)...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	r := qemuReport{messages: stderr.String()}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		r.Exit = exit.ExitCode()
	} else if err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, stderr.String())
	}
	if r.Exit != 1 {
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("qemu-img check: %v in %s", err, out)
		}
	}
	return r
}

func qemu(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// qemuImage makes an image in dir with data, zeroes and discarded ranges in nClusters guest clusters, and more as the features say.
func qemuImage(t testing.TB, dir string, clusterSize, refcountBits int, features string) string {
	t.Helper()
	has := func(f string) bool { return strings.Contains(features, f) }
	path := filepath.Join(dir, fmt.Sprintf("%d-%d-%s.qcow2", clusterSize, refcountBits, features))
	options := fmt.Sprintf("cluster_size=%d,refcount_bits=%d", clusterSize, refcountBits)
	for _, o := range []struct{ feature, options string }{
		{"v2", "compat=0.10"},
		{"extended", "extended_l2=on"},
		{"datafile", "data_file=" + path + ".data"},
		{"raw", "data_file_raw=on"},
		{"luks", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"},
	} {
		if has(o.feature) {
			options += "," + o.options
		}
	}
	size := fmt.Sprint(80*clusterSize + 512)
	at := func(format string, clusters ...int) string {
		args := make([]any, len(clusters))
		for i, c := range clusters {
			args[i] = c * clusterSize
		}
		return fmt.Sprintf(format, args...)
	}
	if has("compressed") {
		raw := filepath.Join(dir, "raw")
		if err := os.WriteFile(raw, bytes.Repeat([]byte("compressible "), 20*clusterSize/13), 0o600); err != nil {
			t.Fatal(err)
		}
		qemu(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
		qemu(t, "qemu-img", "resize", "-f", "qcow2", path, size)
	} else {
		create := []string{"create", "-f", "qcow2", "--object", "secret,id=s,data=abc123", "-o", options, path, size}
		// While it measures how fast it hashes, QEMU fails now and then ("Unable to get accurate CPU usage").
		for try := 0; has("luks") && try < 10; try++ {
			if exec.CommandContext(t.Context(), "qemu-img", create...).Run() == nil {
				create = nil
				break
			}
		}
		if create != nil {
			qemu(t, "qemu-img", create...)
		}
	}
	name := named(path, features)
	io := func(commands ...string) {
		args := []string{"-d", "unmap"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		qemu(t, "qemu-io", append(args, name...)...)
	}
	bitmap := func(bitmap string) {
		qemu(t, "qemu-img", append(append([]string{"bitmap", "--add", "-g", "65536"}, name...), bitmap)...)
	}
	snapshot := func(snapshot string) {
		qemu(t, "qemu-img", append([]string{"snapshot", "-c", snapshot}, name...)...)
	}
	io(
		at("write -P 1 %d %d", 3, 9), at("write -P 2 %d %d", 70, 4), at("write -z %d %d", 5, 2), at("write -z -u %d %d", 8, 2),
		at("discard %d %d", 71, 1), at("write -z %d %d", 30, 3), at("write -P 3 %d %d", 40, 1),
	)
	if has("datafile") { // an entry of zeroes with COPIED and, as far as it says, no host cluster
		io(at("write -P 6 0 %d", 1), at("write -z 0 %d", 1))
	}
	if has("snapshot") {
		snapshot("one")
		io(at("write -P 4 %d %d", 4, 3))
		snapshot("two")
		io(at("discard %d %d", 40, 1))
	}
	if has("bitmap") {
		bitmap("dirty")
		io(at("write -P 5 %d %d", 50, 2))
		bitmap("other")
	}
	return path
}

type qemuCase struct {
	clusterSize, refcountBits int
	features                  string
}

func qemuCases() []qemuCase {
	cases := []qemuCase{
		{512, 1, "plain"},
		{512, 64, "snapshot-bitmap"},
		{4096, 2, "snapshot"},
		{4096, 4, "snapshot-bitmap"},
		{4096, 16, "compressed-bitmap"},
		{65536, 8, "compressed-snapshot"},
		{65536, 16, "snapshot-bitmap"},
		{65536, 32, "plain"},
		{2 << 20, 16, "plain"},
		{512, 16, "v2"},
		{4096, 16, "v2-compressed-snapshot"},
		{16384, 16, "extended-snapshot-bitmap"},
		{65536, 4, "extended"},
		{65536, 16, "extended-compressed-snapshot"},
		{4096, 16, "datafile-bitmap"},
		{65536, 16, "datafile-raw"},
		{65536, 8, "datafile-extended"},
		{4096, 16, "luks-snapshot-bitmap"},
		{65536, 32, "luks-extended"},
	}
	if os.Getenv("QCOW_CSI_LONG") == "" {
		return cases
	}
	cases = nil
	for _, size := range []int{512, 4096, 65536, 2 << 20} {
		for _, bits := range []int{1, 2, 4, 8, 16, 32, 64} {
			features := "compressed-snapshot-bitmap"
			switch bits {
			case 1:
				features = "bitmap" // nothing can be shared
			case 2, 4:
				features = "snapshot-bitmap" // too narrow for many compressed clusters in one
			}
			cases = append(cases, qemuCase{size, bits, features}, qemuCase{size, bits, "plain"}, qemuCase{size, bits, "datafile-bitmap"})
			if size >= 1<<format.MinExtendedL2ClusterBits {
				cases = append(cases, qemuCase{size, bits, "extended-" + features}, qemuCase{size, bits, "datafile-raw-extended"})
			}
			if bits == 16 {
				cases = append(cases, qemuCase{size, bits, "v2-compressed-snapshot"}, qemuCase{size, bits, "v2"}, qemuCase{size, bits, "luks-snapshot"})
			}
		}
	}
	return cases
}

// TestQEMUImagesAreJudgedAsQEMUJudgesThem checks images that QEMU made, as they are and with damage to their tables at random but
// reproducible places.
func TestQEMUImagesAreJudgedAsQEMUJudgesThem(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	seed, rounds := seed.Of(t), 12
	if os.Getenv("QCOW_CSI_LONG") != "" {
		rounds = 100
	}
	dir := t.TempDir()
	verdicts := make(map[string]int)
	for i, c := range qemuCases() {
		t.Run(fmt.Sprintf("%d/%d/%s", c.clusterSize, c.refcountBits, c.features), func(t *testing.T) {
			path := qemuImage(t, dir, c.clusterSize, c.refcountBits, c.features)
			base, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got, want := mustCheck(t, memory(base)), qemuCheck(t, path, c.features)
			if want.Exit != 0 || !got.Clean() {
				t.Fatalf("qemu-img check exits %d with %s, here %v", want.Exit, want.messages, got)
			}
			if got.TotalClusters != want.Total || got.AllocatedClusters != want.Allocated || got.FragmentedClusters != want.Fragmented ||
				got.CompressedClusters != want.Compressed || got.ImageEnd != want.ImageEnd {
				t.Errorf("got  %+v\nwant %+v", *got, want)
			}

			tables := findTables(t, base)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(i<<32+round)))
				image := bytes.Clone(base)
				var done []string
				for range 1 + rng.IntN(2) {
					done = append(done, tables.damage(image, rng))
				}
				if err := os.WriteFile(path, image, 0o600); err != nil {
					t.Fatal(err)
				}
				got, want := mustCheck(t, memory(image)), qemuCheck(t, path, c.features)
				verdict, ok := compare(got, want, len(image))
				verdicts[verdict]++
				if !ok {
					t.Errorf("round %d: %s: after\n%s\nqemu-img check exits %d:\n%s\nhere: %v", round, verdict,
						strings.Join(done, "\n"), want.Exit, want.messages, got)
				}
			}
		})
	}
	t.Logf("%v", verdicts)
}

// compare compares the verdicts on an image file of n bytes. Where they differ only findings explain it that the package comment
// declares to be stricter.
func compare(got *check.Report, want qemuReport, n int) (verdict string, ok bool) {
	strictLeaks, strictCorruptions := 0, 0
	for _, f := range got.Findings {
		switch {
		case f.Kind == check.Leaked && int(f.Offset) >= n:
			strictLeaks++ // a refcount past the end of the file
		case f.Kind == check.Overlap:
			strictCorruptions++ // sharing with a refcount that agrees
		case f.Kind == check.CopiedSet && f.Table == check.L2Table && !strings.Contains(f.Detail, "refcount") && !strings.Contains(f.Detail, "compressed"):
			strictCorruptions++ // COPIED in an entry that has no cluster
		case f.Kind == check.Misplaced:
			strictCorruptions++ // a cluster of a data file not at its guest offset
		case f.Kind == check.ReservedBits && f.Table == check.L2Table && onlyZeroFlag(f):
			strictCorruptions++ // the zero flag where it is reserved
		}
	}
	if got.Leaks+got.Corruptions > len(got.Findings) {
		return "too many findings", want.Exit == 2 || want.Exit == 1
	}
	switch {
	case want.Exit == 1 || want.Exit == 2:
		return "both corrupt", got.Corruptions > 0
	case got.Corruptions > strictCorruptions:
		return "corrupt only here", false
	case got.Corruptions > 0:
		return "corrupt here by a declared difference", true
	case int(want.Leaks) != got.Leaks-strictLeaks:
		return "different numbers of leaks", false
	case want.Exit == 3:
		return "both leaks", true
	case got.Leaks > 0:
		return "leaks here by a declared difference", true
	default:
		return "both clean", true
	}
}

// onlyZeroFlag reports whether an L2 entry has no reserved bits but the zero flag.
func onlyZeroFlag(f check.Finding) bool {
	var entry uint64
	_, err := fmt.Sscanf(f.Detail, "entry %v", &entry)
	return err == nil && format.L2Entry(entry).Reserved() == 0
}

// tables are the places to damage.
type tables struct {
	h       *format.Header
	entries map[string][]int // offsets of 8-byte entries
	blocks  []int            // offsets of refcount blocks
}

// findTables finds the tables of a valid image.
func findTables(t testing.TB, image []byte) *tables {
	t.Helper()
	h, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	ts := &tables{h: h, entries: make(map[string][]int)}
	add := func(name string, off, n uint64) {
		for ; n > 0 && off+8 <= uint64(len(image)); off, n = off+8, n-1 {
			ts.entries[name] = append(ts.entries[name], int(off))
		}
	}
	l1 := func(name string, off, n uint64) {
		add(name, off, n)
		for i := range n {
			if l2 := format.L1Entry(format.Entry(image[off:], i)).Offset(); l2 != 0 {
				add("L2 table", uint64(l2), h.ClusterSize()/format.EntrySize)
			}
		}
	}
	l1("L1 table", uint64(h.L1Offset), uint64(h.L1Entries))
	at := uint64(h.SnapshotsOffset)
	for range h.Snapshots {
		e := image[at:]
		add("snapshot table", at, 6)
		l1("snapshot L1 table", binary.BigEndian.Uint64(e), uint64(binary.BigEndian.Uint32(e[8:])))
		at += 40 + uint64(binary.BigEndian.Uint16(e[12:])) + uint64(binary.BigEndian.Uint16(e[14:])) + uint64(binary.BigEndian.Uint32(e[36:]))
		at = (at + 7) &^ 7
	}
	if ext := h.Extension(format.ExtBitmaps); ext != nil {
		directory := binary.BigEndian.Uint64(ext.Data[16:])
		add("bitmap directory", directory, binary.BigEndian.Uint64(ext.Data[8:])/8)
		add("bitmap table", binary.BigEndian.Uint64(image[directory:]), uint64(binary.BigEndian.Uint32(image[directory+8:])))
	}
	add("refcount table", uint64(h.RefcountTableOffset), h.RefcountTableBytes()/8)
	for i := range h.RefcountTableBytes() / 8 {
		if off := format.RefcountTableEntry(format.Entry(image[h.RefcountTableOffset:], i)).Offset(); off != 0 {
			ts.blocks = append(ts.blocks, int(off))
		}
	}
	return ts
}

// damage changes one place of a table, and says which.
func (ts *tables) damage(image []byte, rng *rand.Rand) string {
	names := []string{"refcount block", "L1 table", "L2 table", "refcount table", "snapshot table", "snapshot L1 table", "bitmap directory", "bitmap table"}
	name := names[min(rng.IntN(len(names)+4), 11)%len(names)] // the first four are twice as likely
	entries := ts.entries[name]
	if len(entries) == 0 {
		name = "refcount block"
	}
	if name == "refcount block" {
		cluster := rng.IntN(len(image)/int(ts.h.ClusterSize()) + 1)
		if rng.IntN(10) == 0 {
			cluster = rng.IntN(int(ts.h.BlockEntries()) * len(ts.blocks))
		}
		block := min(cluster>>ts.h.BlockBits(), len(ts.blocks)-1)
		b := image[ts.blocks[block]:][:ts.h.ClusterSize()]
		i := uint64(cluster) & (ts.h.BlockEntries() - 1)
		old := format.Refcount(b, ts.h.RefcountOrder, i)
		v := old ^ 1<<rng.IntN(int(ts.h.RefcountBits()))
		format.PutRefcount(b, ts.h.RefcountOrder, i, v)
		return fmt.Sprintf("refcount %d of block %d: %d -> %d", i, block, old, v)
	}
	// Most entries are 0: prefer one that is not.
	off := entries[rng.IntN(len(entries))]
	if rng.IntN(5) > 0 {
		for start := rng.IntN(len(entries)); format.Entry(image[off:], 0) == 0 && start >= 0; start-- {
			off = entries[start]
		}
	}
	old := format.Entry(image[off:], 0)
	v := old
	switch rng.IntN(8) {
	case 0:
		v = 0
	case 1: // what another entry has
		v = format.Entry(image[entries[rng.IntN(len(entries))]:], 0)
	default:
		v ^= 1 << rng.IntN(64)
	}
	format.PutEntry(image[off:], 0, v)
	return fmt.Sprintf("%s at %#x: %#x -> %#x", name, off, old, v)
}
