package dehydrate_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/dehydrate"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// secret is what guest data says. No dump may hold it.
const secret = "guest data "

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// subject is a kind of image. All hold data, compressed or not.
type subject struct {
	name        string
	clusterSize int
	options     string
	features    string // snapshot, compressed, bitmap
}

var subjects = []subject{
	{"small clusters", 512, "refcount_bits=64", "snapshot bitmap"},
	{"compressed", 4096, "refcount_bits=16", "compressed snapshot"},
	{"version 2", 512, "compat=0.10", "snapshot"},
	{"extended L2", 16384, "extended_l2=on", "snapshot bitmap"},
	{"default", 65536, "lazy_refcounts=on", "snapshot bitmap"},
}

// image makes an image in dir and returns its path.
func (s subject) image(t testing.TB, dir string) string {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "image.qcow2")
	if err := os.WriteFile(raw, bytes.Repeat([]byte(secret), 30*s.clusterSize/len(secret)), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,%s", s.clusterSize, s.options)}
	if strings.Contains(s.features, "compressed") {
		args = append(args, "-c")
	}
	run(t, "qemu-img", append(args, raw, path)...)
	if strings.Contains(s.features, "snapshot") {
		run(t, "qemu-img", "snapshot", "-c", "first", path)
		run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -s %s 0 %d", raw, 2*s.clusterSize), path)
	}
	if strings.Contains(s.features, "bitmap") {
		run(t, "qemu-img", "bitmap", "--add", path, "dirty")
		run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -s %s %d %d", raw, 5*s.clusterSize, s.clusterSize), path)
	}
	return path
}

func dump(t testing.TB, image []byte, o dehydrate.Options) ([]byte, *dehydrate.Result) {
	t.Helper()
	var b bytes.Buffer
	r, err := dehydrate.Dehydrate(t.Context(), storage.NewMemoryFrom(bytes.Clone(image)), &b, o)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), r
}

func restore(t testing.TB, d []byte) ([]byte, *dehydrate.Result) {
	t.Helper()
	f := storage.NewMemory()
	r, err := dehydrate.Rehydrate(t.Context(), bytes.NewReader(d), f)
	if err != nil {
		t.Fatal(err)
	}
	return f.Bytes(), r
}

// verdict is what the checker says of an image.
func verdict(t testing.TB, image []byte) string {
	t.Helper()
	r, err := check.Check(t.Context(), storage.NewMemoryFrom(bytes.Clone(image)), check.Options{})
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%+v", *r)
}

// qemuVerdict is the exit status of qemu-img check.
func qemuVerdict(t testing.TB, dir string, image []byte) int {
	t.Helper()
	path := filepath.Join(dir, "checked.qcow2")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	var failed *exec.ExitError
	err := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", path).Run()
	if err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	if failed != nil {
		return failed.ExitCode()
	}
	return 0
}

// TestCheckSaysTheSame dehydrates and rehydrates images, and checks what comes out.
func TestCheckSaysTheSame(t *testing.T) {
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			dir := t.TempDir()
			image, err := os.ReadFile(s.image(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			d, said := dump(t, image, dehydrate.Options{})
			if said.Incomplete || said.LeftOut != 0 || said.Length != int64(len(image)) {
				t.Errorf("%+v", said)
			}
			if bytes.Contains(d, []byte(secret)) {
				t.Error("the dump holds guest data")
			}
			got, read := restore(t, d)
			if len(got) != len(image) || read.Metadata != said.Metadata || read.Length != said.Length || read.Incomplete {
				t.Errorf("%d bytes of %d, %+v, %+v", len(got), len(image), read, said)
			}
			if is, was := verdict(t, got), verdict(t, image); is != was {
				t.Errorf("the checker says %s, not %s", is, was)
			}
			if is, was := qemuVerdict(t, dir, got), qemuVerdict(t, dir, image); is != was {
				t.Errorf("qemu-img check: %d, not %d", is, was)
			}
			again, _ := dump(t, got, dehydrate.Options{})
			if !bytes.Equal(again, d) {
				t.Error("the dump of the rehydrated image is another one")
			}
		})
	}
}

// TestDamagedImages dumps images with damage at random places.
func TestDamagedImages(t *testing.T) {
	seed, rounds := seed.Of(t), 40
	if os.Getenv("QCOW_CSI_LONG") != "" {
		rounds = 2000
	}
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			dir := t.TempDir()
			valid, err := os.ReadFile(s.image(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			words := metadataWords(t, valid)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				image := bytes.Clone(valid)
				for range 1 + rng.IntN(3) {
					word := image[words[rng.IntN(len(words))]:]
					switch rng.IntN(3) {
					case 0:
						format.PutEntry(word, 0, format.Entry(word, 0)^1<<rng.IntN(64))
					case 1:
						copy(word[:8], image[words[rng.IntN(len(words))]:][:8])
					case 2:
						format.PutEntry(word, 0, uint64(rng.IntN(len(image))&^(s.clusterSize-1)))
					}
				}
				copy(image, valid[:8]) // without its magic it is no image
				if rng.IntN(8) == 0 {
					image = image[:len(image)-rng.IntN(len(image)/4)]
				}
				d, said := dump(t, image, dehydrate.Options{Ambiguous: true})
				got, _ := restore(t, d)
				if is, was := verdict(t, got), verdict(t, image); is != was {
					t.Fatalf("seed %d, round %d: the checker says %s, not %s; %+v", seed, round, is, was, said)
				}
				d, said = dump(t, image, dehydrate.Options{})
				got, read := restore(t, d)
				if read.Incomplete != (said.LeftOut > 0) {
					t.Fatalf("seed %d, round %d: %+v, %+v", seed, round, read, said)
				}
				if !said.Incomplete && verdict(t, got) != verdict(t, image) {
					t.Fatalf("seed %d, round %d: complete, but the checker says something else", seed, round)
				}
			}
		})
	}
}

// metadataWords returns the offsets of the 8-byte words that are in the dump of an image.
func metadataWords(t testing.TB, image []byte) (words []int) {
	t.Helper()
	d, _ := dump(t, image, dehydrate.Options{})
	for pos := 32; binary.BigEndian.Uint32(d[pos:]) != 3; {
		kind, n, off := binary.BigEndian.Uint32(d[pos:]), int(binary.BigEndian.Uint32(d[pos+4:])), int(binary.BigEndian.Uint64(d[pos+8:]))
		pos += 20
		if kind == 1 {
			pos += n
			for w := off &^ 7; w+8 <= min(off+n, len(image)); w += 8 {
				words = append(words, w)
			}
		}
	}
	return words
}

// TestGuestDataNamedAsATable has an L1 entry that points to guest data.
func TestGuestDataNamedAsATable(t *testing.T) {
	s := subjects[4]
	image, err := os.ReadFile(s.image(t, t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	h, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	snapshot, _, err := format.DecodeSnapshots(image[h.SnapshotsOffset:], 1)
	if err != nil {
		t.Fatal(err)
	}
	l2 := format.L1Entry(format.Entry(image[h.L1Offset:], 0)).Offset()
	data := format.L2Entry(format.Entry(image[l2:], 3)).Offset()
	format.PutEntry(image[snapshot[0].L1Offset:], 0, uint64(data))
	d, said := dump(t, image, dehydrate.Options{})
	if bytes.Contains(d, []byte(secret)) || said.LeftOut != 1 || said.Omissions[0].Offset != data || !strings.Contains(said.Omissions[0].String(), "guest data") {
		t.Errorf("%+v", said)
	}
	if d, said = dump(t, image, dehydrate.Options{Ambiguous: true}); !bytes.Contains(d, []byte(secret)) || said.Incomplete {
		t.Errorf("%+v", said)
	}
}

// TestKeyMaterial looks for what unlocks an encrypted image.
func TestKeyMaterial(t *testing.T) {
	require.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	createLUKS(t, path)
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	off, n, err := h.Encryption()
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	d, said := dump(t, image, dehydrate.Options{})
	got, read := restore(t, d)
	luks := got[off:][:n]
	if !said.KeysZeroed || !read.KeysZeroed || !bytes.Equal(luks[:592], image[off:][:592]) || len(bytes.Trim(luks[592:], "\x00")) > 0 {
		t.Errorf("%+v", said)
	}
	if verdict(t, got) != verdict(t, image) {
		t.Error("the checker says something else")
	}
	d, said = dump(t, image, dehydrate.Options{KeyMaterial: true})
	got, read = restore(t, d)
	if said.KeysZeroed || read.KeysZeroed || !bytes.Equal(got[off:][:n], image[off:][:n]) {
		t.Errorf("%+v", said)
	}
	copy(image[off:], "something else")
	d, _ = dump(t, image, dehydrate.Options{})
	if got, _ = restore(t, d); len(bytes.Trim(got[off:][:n], "\x00")) > 0 {
		t.Error("what is no LUKS header is in the dump")
	}
}

// TestNames looks for the names of other files.
func TestNames(t *testing.T) {
	h := format.Header{Geometry: format.Geometry{ClusterBits: 12, RefcountOrder: 4, DataFile: true}, BackingFile: "confidential-base", RefcountTableOffset: 1 << 12, RefcountTableClusters: 1}
	h.SetExtension(format.ExtDataFile, []byte("confidential-data"))
	image, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	image = append(image, make([]byte, 3<<12-len(image))...)
	d, said := dump(t, image, dehydrate.Options{})
	if got, _ := restore(t, d); said.NamesRedacted || !bytes.Equal(got, image) {
		t.Errorf("%+v", said)
	}
	d, said = dump(t, image, dehydrate.Options{RedactNames: true})
	got, read := restore(t, d)
	is, err := format.DecodeHeader(got)
	if err != nil {
		t.Fatal(err)
	}
	if !said.NamesRedacted || !read.NamesRedacted || bytes.Contains(d, []byte("confidential")) || is.BackingFile != strings.Repeat("x", 17) || is.DataFileName() != strings.Repeat("x", 17) {
		t.Errorf("%+v: %q, %q", said, is.BackingFile, is.DataFileName())
	}
	binary.BigEndian.PutUint32(image[100:], 5) // a header length that cannot be decoded
	d, said = dump(t, image, dehydrate.Options{RedactNames: true})
	if bytes.Contains(d, []byte("confidential")) || !said.Incomplete {
		t.Errorf("%+v", said)
	}
}

// TestNotAnImage has nothing to dump.
func TestNotAnImage(t *testing.T) {
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"empty":     {nil, format.ErrCorrupt},
		"zeroes":    {make([]byte, 1<<16), format.ErrCorrupt},
		"version 7": {append([]byte{'Q', 'F', 'I', 0xfb, 0, 0, 0, 7}, make([]byte, 1<<16)...), format.ErrUnsupported},
	} {
		var b bytes.Buffer
		_, err := dehydrate.Dehydrate(t.Context(), storage.NewMemoryFrom(c.image), &b, dehydrate.Options{})
		if !errors.Is(err, c.want) || b.Len() > 0 {
			t.Errorf("%s: %v, %d bytes", name, err, b.Len())
		}
	}
}

// stream makes a dump by hand.
type stream struct{ b []byte }

func (s *stream) sum(from int) {
	s.b = binary.BigEndian.AppendUint32(s.b, crc32.Checksum(s.b[from:], crc32.MakeTable(crc32.Castagnoli)))
}

func newStream(length uint64) *stream {
	s := &stream{[]byte("QCSIMETA\x00\x00\x00\x01\x00\x00\x00\x00")}
	s.b = binary.BigEndian.AppendUint64(s.b, length)
	s.b = append(s.b, 0, 0, 0, 0)
	s.sum(0)
	return s
}

func (s *stream) run(kind, n uint32, off uint64, content []byte) *stream {
	from := len(s.b)
	s.b = binary.BigEndian.AppendUint32(s.b, kind)
	s.b = binary.BigEndian.AppendUint32(s.b, n)
	s.b = append(binary.BigEndian.AppendUint64(s.b, off), content...)
	if kind == 3 {
		from = 0
	}
	s.sum(from)
	return s
}

// TestHostileDumps feeds Rehydrate with dumps that no Dehydrate has made. The file stays empty.
func TestHostileDumps(t *testing.T) {
	valid := newStream(100).run(1, 4, 10, []byte("abcd")).run(2, 6, 14, nil).run(3, 0, 2, nil).b
	if got, _ := restore(t, valid); len(got) != 100 || string(got[10:14]) != "abcd" || len(bytes.Trim(got, "\x00")) != 4 {
		t.Fatalf("%q", got)
	}
	dumps := map[string][]byte{
		"empty":             nil,
		"too long":          newStream(1<<63).run(3, 0, 0, nil).b,
		"descending":        newStream(100).run(1, 1, 10, []byte("a")).run(1, 1, 5, []byte("b")).run(3, 0, 2, nil).b,
		"overlapping":       newStream(100).run(1, 2, 10, []byte("ab")).run(2, 1, 11, nil).run(3, 0, 2, nil).b,
		"behind the length": newStream(100).run(1, 2, 99, []byte("ab")).run(3, 0, 1, nil).b,
		"overflow":          newStream(100).run(2, 2, 1<<64-1, nil).run(3, 0, 1, nil).b,
		"empty run":         newStream(100).run(2, 0, 10, nil).run(3, 0, 1, nil).b,
		"large run":         newStream(1<<30).run(1, 1<<30, 0, nil).b,
		"unknown kind":      newStream(100).run(9, 1, 0, nil).run(3, 0, 1, nil).b,
		"number of runs":    newStream(100).run(2, 1, 0, nil).run(3, 0, 2, nil).b,
	}
	for n := range valid {
		dumps[fmt.Sprintf("cut to %d", n)] = valid[:n]
		flipped := bytes.Clone(valid)
		flipped[n] ^= 0x10
		dumps[fmt.Sprintf("byte %d", n)] = flipped
	}
	for name, d := range dumps {
		f := storage.NewMemory()
		_, err := dehydrate.Rehydrate(t.Context(), bytes.NewReader(d), f)
		if !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrUnsupported) || len(f.Bytes()) != 0 {
			t.Errorf("%s: %v, %d bytes", name, err, len(f.Bytes()))
		}
	}
	if _, err := dehydrate.Rehydrate(t.Context(), bytes.NewReader(valid), storage.NewMemoryFrom([]byte{1})); !errors.Is(err, format.ErrInvalid) {
		t.Error(err)
	}
}

// FuzzRehydrate feeds Rehydrate with anything. The file is never longer than the dump says.
func FuzzRehydrate(f *testing.F) {
	f.Add(newStream(100).run(1, 4, 10, []byte("abcd")).run(2, 6, 14, nil).run(3, 0, 2, nil).b)
	f.Add([]byte("QCSIMETA"))
	f.Fuzz(func(t *testing.T, d []byte) {
		if len(d) >= 24 && binary.BigEndian.Uint64(d[16:]) > 1<<20 {
			return // a file in memory is not sparse
		}
		file := storage.NewMemory()
		r, err := dehydrate.Rehydrate(t.Context(), bytes.NewReader(d), file)
		if err != nil && len(file.Bytes()) > 0 || err == nil && int64(len(file.Bytes())) != r.Length {
			t.Errorf("%v, %d bytes", err, len(file.Bytes()))
		}
	})
}

// FuzzDehydrate dumps anything that begins like an image.
func FuzzDehydrate(f *testing.F) {
	h := format.Header{Geometry: format.Geometry{ClusterBits: 9, RefcountOrder: 4}, Size: 1 << 15, L1Entries: 1, L1Offset: 1024, RefcountTableOffset: 512, RefcountTableClusters: 1}
	image, err := h.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(image, make([]byte, 2048)...))
	f.Fuzz(func(t *testing.T, image []byte) {
		var b bytes.Buffer
		said, err := dehydrate.Dehydrate(t.Context(), storage.NewMemoryFrom(bytes.Clone(image)), &b, dehydrate.Options{Ambiguous: true})
		if err != nil {
			return
		}
		got, read := restore(t, b.Bytes())
		if len(got) != len(image) || read.Metadata != said.Metadata {
			t.Errorf("%d bytes of %d, %+v, %+v", len(got), len(image), read, said)
		}
	})
}

// createLUKS makes an encrypted image. QEMU first measures how fast it derives keys, and gives up when the machine is too busy for that.
func createLUKS(t *testing.T, path string) {
	t.Helper()
	for range 50 {
		out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=k,data=passphrase",
			"-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", path, "1M").CombinedOutput()
		switch {
		case err == nil:
			return
		case !strings.Contains(string(out), "Unable to get accurate CPU usage"):
			t.Fatalf("qemu-img create: %v\n%s", err, out)
		}
	}
	t.Fatal("qemu-img could not measure in 50 tries how fast it derives keys")
}
