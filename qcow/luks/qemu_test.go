package luks_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// qemu runs one of QEMU's tools and returns what it says. It repeats a run that failed because the clock of the
// processor time did not move while QEMU measured its hash: that says nothing about the image, and happens often
// where that clock is coarse.
func qemu(t testing.TB, tool string, args ...string) string {
	t.Helper()
	var out []byte
	var err error
	for range 1000 {
		out, err = exec.Command(tool, args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Unable to get accurate CPU usage") {
			break
		}
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// secret is the object by which QEMU's tools know a passphrase under a name.
func secret(name, passphrase string) []string {
	return []string{"--object", "secret,id=" + name + ",data=" + passphrase}
}

// opts joins options given as pairs, leaving out those without a value, with a prefix before each name.
func opts(prefix string, pairs ...string) string {
	var all []string
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			all = append(all, prefix+pairs[i]+"="+pairs[i+1])
		}
	}
	return strings.Join(all, ",")
}

// qemuOptions names the algorithms of o to QEMU.
func qemuOptions(prefix string, o luks.CreateOptions) string {
	return opts(prefix, "key-secret", "s", "iter-time", "10", "cipher-alg", o.Cipher, "cipher-mode", o.Mode,
		"ivgen-alg", o.IVGenerator, "ivgen-hash-alg", o.IVHash, "hash-alg", o.Hash)
}

// qemuDevice makes a LUKS file of QEMU's, whose payload has size bytes, and returns its path. It takes QEMU a few
// seconds, however few iterations it shall come to.
func qemuDevice(t testing.TB, o luks.CreateOptions, passphrase string, size int64) string {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "device.luks")
	args := append([]string{"create", "-q", "-f", "luks"}, secret("s", passphrase)...)
	qemu(t, "qemu-img", append(args, "-o", qemuOptions("", o), path, strconv.FormatInt(size, 10))...)
	return path
}

// device makes a LUKS file with a header and a payload of size bytes, and returns its path.
func device(t testing.TB, header []byte, size int64) string {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "device.luks")
	if err := os.WriteFile(path, header, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(len(header))+size); err != nil {
		t.Fatal(err)
	}
	return path
}

// create makes a header that takes little time to open.
func create(t testing.TB, o luks.CreateOptions, passphrase string) ([]byte, *luks.Cipher) {
	t.Helper()
	if o.Iterations == 0 {
		o.Iterations = luks.MinIterations
	}
	header, c, err := luks.Create(t.Context(), []byte(passphrase), o)
	if err != nil {
		t.Fatal(err)
	}
	return header, c
}

// deviceIO runs commands of qemu-io on the plain text of a LUKS file.
func deviceIO(t testing.TB, path, passphrase string, commands ...string) {
	t.Helper()
	imageIO(t, "driver=luks,file.filename="+path+",key-secret=s", passphrase, commands...)
}

func imageIO(t testing.TB, image, passphrase string, commands ...string) {
	t.Helper()
	args := append(secret("s", passphrase), "--image-opts", image)
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := qemu(t, "qemu-io", args...)
	if strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "failed:") {
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
}

// refused checks that QEMU does not open a LUKS file with a passphrase.
func refused(t testing.TB, path, passphrase string) {
	t.Helper()
	args := append(secret("s", passphrase), "--image-opts", "driver=luks,file.filename="+path+",key-secret=s", "-c", "read 0 512")
	out, err := exec.Command("qemu-io", args...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Invalid password") {
		t.Errorf("QEMU opens the file with %q, error %v: %s", passphrase, err, out)
	}
}

// imageInfo is what qemu-img info says of an encryption header.
type imageInfo struct {
	Cipher     string `json:"cipher-alg"`
	Mode       string `json:"cipher-mode"`
	IV         string `json:"ivgen-alg"`
	IVHash     string `json:"ivgen-hash-alg"`
	Hash       string `json:"hash-alg"`
	Payload    uint64 `json:"payload-offset"`
	Iterations uint32 `json:"master-key-iters"`
	UUID       string `json:"uuid"`
	Slots      []struct {
		Active     bool   `json:"active"`
		Iterations uint32 `json:"iters"`
		Offset     uint64 `json:"key-offset"`
		Stripes    uint32 `json:"stripes"`
	} `json:"slots"`
}

// sameInfo compares what a header tells here with what it tells QEMU, which is silent about inactive slots' stripes.
func sameInfo(t testing.TB, got *luks.Info, want imageInfo) {
	t.Helper()
	if got.Cipher != want.Cipher || got.Mode != want.Mode || got.IVGenerator != want.IV || got.IVHash != want.IVHash || got.Hash != want.Hash ||
		got.PayloadOffset != want.Payload || got.MasterKeyIterations != want.Iterations || got.UUID != want.UUID || len(want.Slots) != luks.Slots {
		t.Errorf("%+v, QEMU says %+v", got, want)
		return
	}
	for i, w := range want.Slots {
		g := got.KeySlots[i]
		if !w.Active {
			g.Iterations, g.Stripes = 0, 0
		}
		if g.Active != w.Active || g.Iterations != w.Iterations || g.KeyOffset != w.Offset || g.Stripes != w.Stripes {
			t.Errorf("slot %d: %+v, QEMU says %+v", i, g, w)
		}
	}
}

// infoOf returns what qemu-img info says of an image's encryption.
func infoOf(t testing.TB, path, driver string) imageInfo {
	t.Helper()
	out := qemu(t, "qemu-img", "info", "-U", "--output=json", "-f", driver, path)
	var info struct {
		Specific struct {
			Data struct {
				imageInfo
				Encrypt *imageInfo `json:"encrypt"` // of qcow2
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	if e := info.Specific.Data.Encrypt; e != nil {
		return *e
	}
	return info.Specific.Data.imageInfo
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeAt(t testing.TB, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(p, off); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// open opens a header that must open.
func open(t testing.TB, header []byte, passphrase string) (*luks.Cipher, *luks.Info) {
	t.Helper()
	c, info, err := luks.Open(t.Context(), header, []byte(passphrase))
	if err != nil {
		t.Fatal(err)
	}
	return c, info
}

// decrypts checks that p, encrypted, is full of the byte plain.
func decrypts(t testing.TB, c *luks.Cipher, p []byte, sector uint64, plain byte) {
	t.Helper()
	got := bytes.Clone(p)
	c.Decrypt(got, sector)
	if !bytes.Equal(got, bytes.Repeat([]byte{plain}, len(p))) {
		t.Errorf("%d bytes at sector %d do not decrypt to %#x: % x...", len(p), sector, plain, got[:16])
	}
}
