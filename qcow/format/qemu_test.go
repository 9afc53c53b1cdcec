package format_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// qemu runs one of QEMU's tools in dir and returns what it prints.
func qemu(t testing.TB, dir, tool string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", tool, strings.Join(args, " "), err, out, stderr.String())
	}
	return out
}

// qemuInfo is what qemu-img info says.
type qemuInfo struct {
	Size          uint64 `json:"virtual-size"`
	ClusterSize   uint64 `json:"cluster-size"`
	Encrypted     bool   `json:"encrypted"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Snapshots     []struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		VMStateSize uint64 `json:"vm-state-size"`
		Seconds     uint32 `json:"date-sec"`
		Nanoseconds uint32 `json:"date-nsec"`
		ClockSec    uint64 `json:"vm-clock-sec"`
		ClockNsec   uint64 `json:"vm-clock-nsec"`
	} `json:"snapshots"`
	Specific struct {
		Data struct {
			Compat       string `json:"compat"`
			Refcount     uint   `json:"refcount-bits"`
			Lazy         bool   `json:"lazy-refcounts"`
			ExtendedL2   bool   `json:"extended-l2"`
			Compression  string `json:"compression-type"`
			DataFile     string `json:"data-file"`
			DataFileRaw  bool   `json:"data-file-raw"`
			BitmapsOfAll []struct {
				Name        string   `json:"name"`
				Granularity uint64   `json:"granularity"`
				Flags       []string `json:"flags"`
			} `json:"bitmaps"`
		} `json:"data"`
	} `json:"format-specific"`
}

// info runs qemu-img info on an image, which may be encrypted or damaged otherwise, without its key.
func info(t testing.TB, dir, file string) qemuInfo {
	t.Helper()
	var i qemuInfo
	if err := json.Unmarshal(qemu(t, dir, "qemu-img", "info", "-f", "qcow2", "--output=json", file), &i); err != nil {
		t.Fatal(err)
	}
	return i
}

func load(t testing.TB, dir, file string) ([]byte, *format.Header) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	h, err := format.DecodeHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	return b, h
}

func save(t testing.TB, dir, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// agrees compares a decoded header with what qemu-img info says of the image.
func agrees(t testing.TB, h *format.Header, i qemuInfo) {
	t.Helper()
	d := i.Specific.Data
	compat, compression := "1.1", "zlib"
	if h.Version == 2 {
		compat = "0.10"
	}
	if h.CompressionType == 1 {
		compression = "zstd"
	}
	if h.Size != i.Size || h.ClusterSize() != i.ClusterSize || (h.CryptMethod != 0) != i.Encrypted || h.BackingFile != i.Backing ||
		h.BackingFormat() != i.BackingFormat || len(i.Snapshots) != int(h.Snapshots) ||
		compat != d.Compat || h.RefcountBits() != d.Refcount || (h.Compatible&format.CompatLazyRefcounts != 0) != d.Lazy || h.ExtendedL2 != d.ExtendedL2 ||
		compression != d.Compression || h.DataFileName() != d.DataFile || h.DataFile != (d.DataFile != "") ||
		(h.Autoclear&format.AutoclearRawDataFile != 0) != d.DataFileRaw {
		t.Errorf("header   %+v\nqemu-img %+v", h, i)
	}
	bitmaps, err := h.Bitmaps()
	if err != nil || (bitmaps != nil) != (len(d.BitmapsOfAll) > 0) {
		t.Errorf("bitmaps %+v, error %v, qemu-img %+v", bitmaps, err, d.BitmapsOfAll)
	}
}

// qemuImages are the options of images to make, and how else to change them.
var qemuImages = []struct {
	options string
	then    string
}{
	{"compat=0.10", ""},
	{"compat=0.10,backing_file=base.raw,backing_fmt=raw", ""},
	{"compat=0.10,cluster_size=512", "snapshot"},
	{"", "snapshot,bitmap"},
	{"cluster_size=512", ""},
	{"cluster_size=512,backing_file=base.raw,backing_fmt=raw", "bitmap"},
	{"cluster_size=1024,refcount_bits=1", ""},
	{"cluster_size=4k,refcount_bits=64", "snapshot"},
	{"cluster_size=2M,lazy_refcounts=on", "bitmap"},
	{"compression_type=zstd", ""},
	{"extended_l2=on", "snapshot,bitmap"},
	{"extended_l2=on,cluster_size=16k,backing_file=base.raw,backing_fmt=raw", ""},
	{"data_file=data.raw", "bitmap"},
	{"data_file=data.raw,data_file_raw=on,cluster_size=4k", ""},
	{"data_file=data.raw,extended_l2=on", ""},
	{"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", ""},
}

func makeImage(t testing.TB, dir, file, options, then string) {
	t.Helper()
	args := []string{"create", "-f", "qcow2"}
	if strings.Contains(options, "luks") {
		args = append(args, "--object", "secret,id=s,data=abc123")
	}
	if options != "" {
		args = append(args, "-o", options)
	}
	args = append(args, file, "8M")
	// While it measures how fast it hashes, QEMU fails now and then ("Unable to get accurate CPU usage").
	for try := 0; strings.Contains(options, "luks") && try < 10; try++ {
		cmd := exec.CommandContext(t.Context(), "qemu-img", args...)
		cmd.Dir = dir
		if cmd.Run() == nil {
			return
		}
	}
	qemu(t, dir, "qemu-img", args...)
	if strings.Contains(then, "snapshot") {
		qemu(t, dir, "qemu-img", "snapshot", "-c", "first", file)
		qemu(t, dir, "qemu-img", "snapshot", "-c", "a longer name, of odd length", file)
		qemu(t, dir, "qemu-img", "snapshot", "-c", "3", file)
	}
	if strings.Contains(then, "bitmap") {
		qemu(t, dir, "qemu-img", "bitmap", "--add", file, "one")
		qemu(t, dir, "qemu-img", "bitmap", "--add", "--disable", "-g", "512", file, "another bitmap, disabled")
	}
}

func TestImagesOfQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	kinds := make(map[format.Kind]int)
	for _, c := range qemuImages {
		t.Run(strings.ReplaceAll(c.options+"/"+c.then, ",", " "), func(t *testing.T) {
			dir := t.TempDir()
			save(t, dir, "base.raw", make([]byte, 1<<20))
			makeImage(t, dir, "image.qcow2", c.options, c.then)
			testHeader(t, dir, "image.qcow2")
			testSnapshots(t, dir, "image.qcow2")
			testBitmaps(t, dir, "image.qcow2")
			if !strings.Contains(c.options, "luks") { // writing needs the key
				testMapping(t, dir, "image.qcow2", kinds)
			}
			testRewrite(t, dir, "image.qcow2")
		})
	}
	for k := format.Unallocated; k <= format.UnallocatedHost; k++ {
		if kinds[k] == 0 {
			t.Errorf("no cluster of kind %v was seen", k)
		}
	}
}

func testHeader(t *testing.T, dir, file string) {
	t.Helper()
	image, h := load(t, dir, file)
	was := info(t, dir, file)
	agrees(t, h, was)
	if off, n, err := h.Encryption(); err != nil || (off != 0) != (h.CryptMethod == 2) || n > 0 && !bytes.HasPrefix(image[off:], []byte("LUKS\xba\xbe")) {
		t.Errorf("encryption header of %d bytes at %#x: %v", n, off, err)
	}

	// What Encode makes of it is the same to QEMU.
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	clear(image[:h.ClusterSize()])
	copy(image, b)
	save(t, dir, "again.qcow2", image)
	if is := info(t, dir, "again.qcow2"); fmt.Sprint(is) != fmt.Sprint(was) {
		t.Errorf("was %+v\nis  %+v", was, is)
	}
	again, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	if essence(again) != essence(h) || len(again.Extensions) != len(h.Extensions) {
		t.Errorf("was    %+v\nbecame %+v", h, again)
	}
}

// testRewrite changes the header of an image that QEMU made. Whatever a crash leaves behind, QEMU reads the old or the new.
func testRewrite(t *testing.T, dir, file string) {
	t.Helper()
	image, h := load(t, dir, file)
	save(t, dir, "other.raw", make([]byte, 1<<20))
	was := info(t, dir, file)
	cluster := image[:h.ClusterSize()]
	h.BackingFile = "other.raw"
	h.SetExtension(format.ExtBackingFormat, []byte("raw"))
	h.SetExtension(0x11223344, bytes.Repeat([]byte{1}, 100))
	if h.Autoclear&format.AutoclearRawDataFile != 0 {
		h.Autoclear &^= format.AutoclearRawDataFile // such an image has no backing file
	}
	writes, err := h.Rewrite(cluster)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool) // states
	olds, news := 0, 0
	for _, w := range writes {
		n := 0
		crashStates(cluster, w, rand.New(rand.NewPCG(5, 6)), func(b []byte) {
			if n++; seen[string(b)] || n > 3 {
				return
			}
			seen[string(b)] = true
			save(t, dir, "torn.qcow2", append(bytes.Clone(b), image[len(b):]...))
			switch is := info(t, dir, "torn.qcow2"); {
			case is.Backing == was.Backing && is.BackingFormat == was.BackingFormat:
				olds++
			case is.Backing == "other.raw" && is.BackingFormat == "raw":
				news++
			default:
				t.Errorf("backing file %s of format %s", is.Backing, is.BackingFormat)
			}
		})
		copy(cluster[w.Offset:], w.Data)
	}
	save(t, dir, "image.qcow2", image)
	is, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	agrees(t, is, info(t, dir, file))
	if is.BackingFile != "other.raw" || olds == 0 || news == 0 {
		t.Errorf("%s at last; %d states are the old, %d the new", is.BackingFile, olds, news)
	}
}

func testSnapshots(t *testing.T, dir, file string) {
	t.Helper()
	image, h := load(t, dir, file)
	if h.Snapshots == 0 {
		return
	}
	list, used, err := format.DecodeSnapshots(image[h.SnapshotsOffset:], h.Snapshots)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range info(t, dir, file).Snapshots {
		s := list[i]
		if s.ID != want.ID || s.Name != want.Name || s.VMStateSize != want.VMStateSize || s.Seconds != want.Seconds || s.Nanoseconds != want.Nanoseconds ||
			s.VMClock != want.ClockSec*1e9+want.ClockNsec || s.DiskSize != h.Size || s.L1Entries != h.L1Entries || s.Extra != nil {
			t.Errorf("got %+v, qemu-img %+v", s, want)
		}
	}
	if b := format.EncodeSnapshots(list); !bytes.Equal(b, image[h.SnapshotsOffset:][:used]) {
		t.Errorf("encoded % x\nfound   % x", b, image[h.SnapshotsOffset:][:used])
	}
}

func testBitmaps(t *testing.T, dir, file string) {
	t.Helper()
	image, h := load(t, dir, file)
	ext, err := h.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	if ext == nil {
		return
	}
	if b := ext.Encode(); !bytes.Equal(b, h.Extension(format.ExtBitmaps).Data) {
		t.Errorf("extension % x", b)
	}
	directory := image[ext.DirectoryOffset:][:ext.DirectorySize]
	list, err := format.DecodeBitmaps(directory, ext.Count)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range info(t, dir, file).Specific.Data.BitmapsOfAll {
		b := list[i]
		auto := strings.Contains(fmt.Sprint(want.Flags), "auto")
		if b.Name != want.Name || uint64(1)<<b.GranularityBits != want.Granularity || (b.Flags&format.BitmapAuto != 0) != auto || b.Flags&format.BitmapInUse != 0 {
			t.Errorf("got %+v, qemu-img %+v", b, want)
		}
		for j := range uint64(b.TableEntries) {
			e := format.BitmapTableEntry(format.Entry(image[b.TableOffset:], j))
			if e.Reserved() != 0 || e.AllOnes() {
				t.Errorf("%s: entry %d is %#x", b.Name, j, e)
			}
		}
	}
	if b := format.EncodeBitmaps(list); !bytes.Equal(b, directory) {
		t.Errorf("encoded % x\nfound   % x", b, directory)
	}
}

// testMapping lets QEMU write, zero and discard at random and compares every sector with what qemu-img map says.
func testMapping(t *testing.T, dir, file string, kinds map[format.Kind]int) {
	t.Helper()
	_, h := load(t, dir, file)
	rng := rand.New(rand.NewPCG(7, uint64(h.ClusterBits)))
	args := []string{"-f", "qcow2", "-d", "unmap", file}
	raw := h.Autoclear&format.AutoclearRawDataFile != 0
	for i := uint64(0); i < 3 && !h.DataFile; i++ { // before anything else: compressed writes overwrite nothing
		args = append(args, "-c", fmt.Sprintf("write -c -P 2 %d %d", (i+1)<<21&^(h.ClusterSize()-1), h.ClusterSize()))
	}
	args = append(args, "-c", "write -P 1 0 512") // in a data file, the cluster at offset 0
	for range 60 {
		off, n := rng.IntN(8<<11)<<9, (1+rng.IntN(1<<(h.ClusterBits-8)))<<9
		op := []string{"write -P 1", "write -z", "write -z -u", "discard"}[rng.IntN(4)]
		args = append(args, "-c", fmt.Sprintf("%s %d %d", op, off, min(n, 8<<20-off)))
	}
	qemu(t, dir, "qemu-io", args...)

	image, h := load(t, dir, file)
	type extent struct {
		Start  uint64
		Length uint64
		Zero   bool
		Data   bool
		Depth  int
		Offset *uint64
	}
	var extents []extent
	if err := json.Unmarshal(qemu(t, dir, "qemu-img", "map", "-f", "qcow2", "--output=json", file), &extents); err != nil {
		t.Fatal(err)
	}
	for _, x := range extents {
		for at := x.Start; at < x.Start+x.Length; at += format.SectorSize {
			guest := format.GuestOffset(at)
			var e format.MappingEntry
			l2 := format.L1Entry(format.Entry(image[h.L1Offset:], h.L1Index(guest)))
			if l2.Reserved() != 0 {
				t.Fatalf("L1 entry %#x", l2)
			}
			if l2.Offset() != 0 {
				e = h.MappingEntry(image[l2.Offset():][:h.ClusterSize()], h.L2Index(guest))
			}
			if problem := h.CheckEntry(e); problem != "" {
				t.Fatalf("entry %#x: %s", e, problem)
			}
			kind := h.Kind(e, h.SubclusterIndex(guest))
			kinds[kind]++
			here := x.Depth == 0
			host := uint64(e.Offset()) + h.InCluster(guest)
			ok := false
			switch kind {
			case format.Data: // QEMU looks into the file for zeroes, too
				ok = here && (x.Data || x.Zero) && x.Offset != nil && *x.Offset+at-x.Start == host
			case format.Compressed:
				ok = here && x.Data && x.Offset == nil
			case format.ZeroedPlain, format.ZeroAllocated:
				ok = here && x.Zero && !x.Data
			case format.Unallocated, format.UnallocatedHost:
				ok = h.BackingFile != "" && at < 1<<20 && x.Depth == 1 || x.Zero && !x.Data
			}
			if !ok && !(raw && x.Offset != nil) { // for a raw data file qemu-img map asks that file
				t.Fatalf("guest %#x: entry %#x of kind %v, qemu-img map %+v", at, e, kind, x)
			}
		}
	}
}
