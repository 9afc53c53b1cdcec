package luks_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

func long() bool { return os.Getenv("QCOW_CSI_LONG") == "1" }

// combinations returns algorithms that QEMU has too: every cipher, mode and IV generator, with the hashes taking
// turns, and each hash with the default of the others; all combinations in the long form.
func combinations() []luks.CreateOptions {
	hashes := []string{"sha256", "sha1", "sha512", "ripemd160", "sha224", "sha384"}
	var all []luks.CreateOptions
	for _, cipher := range []string{"aes-128", "aes-192", "aes-256", "twofish-128", "twofish-192", "twofish-256"} {
		for _, mode := range []string{"xts", "cbc"} {
			if mode == "cbc" && strings.HasSuffix(cipher, "-192") {
				continue // QEMU crashes
			}
			for _, iv := range []string{"plain", "plain64", "essiv"} {
				if iv == "essiv" && mode == "xts" {
					continue // refused
				}
				o := luks.CreateOptions{Cipher: cipher, Mode: mode, IVGenerator: iv}
				if iv == "essiv" {
					o.IVHash = "sha256"
				}
				for i := range hashes {
					if o.Hash = hashes[i]; long() || i == len(all)%len(hashes) {
						all = append(all, o)
						if !long() {
							break
						}
					}
				}
			}
		}
	}
	for _, hash := range hashes {
		all = append(all, luks.CreateOptions{Hash: hash})
	}
	return all
}

func nameOf(o luks.CreateOptions) string {
	return strings.Trim(fmt.Sprintf("%s-%s-%s-%s", o.Cipher, o.Mode, o.IVGenerator, o.Hash), "-")
}

// TestQEMUDevice reads and writes LUKS files that QEMU made, which in turn reads what was written.
func TestQEMUDevice(t *testing.T) {
	all := []luks.CreateOptions{{Cipher: "aes-192", Mode: "xts", IVGenerator: "plain", Hash: "sha1"}} // TestImage has more
	if long() {
		all = combinations()
	}
	for _, o := range all {
		t.Run(nameOf(o), func(t *testing.T) {
			t.Parallel()
			path := qemuDevice(t, o, "correct horse", 64<<10)
			deviceIO(t, path, "correct horse", "write -P 0x5a 0 32k", "write -P 0xa5 32k 32k")
			b := readFile(t, path)
			c, info := open(t, b, "correct horse")
			sameInfo(t, info, infoOf(t, path, "luks"))
			if size, err := luks.HeaderSize(o); err != nil || size != info.PayloadOffset {
				t.Errorf("header size %d, error %v, QEMU's has %d", size, err, info.PayloadOffset)
			}
			payload := b[info.PayloadOffset:]
			decrypts(t, c, payload[:32<<10], 0, 0x5a)
			decrypts(t, c, payload[32<<10:64<<10], 64, 0xa5)

			again := bytes.Repeat([]byte{0x77}, 8<<10)
			c.Encrypt(again, 5)
			writeAt(t, path, int64(info.PayloadOffset)+5*512, again)
			deviceIO(t, path, "correct horse", "read -P 0x5a 0 2560", "read -P 0x77 2560 8k", "read -P 0x5a 10752 22016")
		})
	}
}

// TestCreatedDevice lets QEMU read and write behind headers made here, and reads what it wrote.
func TestCreatedDevice(t *testing.T) {
	for _, o := range combinations() {
		t.Run(nameOf(o), func(t *testing.T) {
			o.Iterations = 1500
			header, c := create(t, o, "correct horse")
			path := device(t, header, 64<<10)
			p := bytes.Repeat([]byte{0x33}, 64<<10)
			c.Encrypt(p, 0)
			writeAt(t, path, int64(len(header)), p)
			deviceIO(t, path, "correct horse", "read -P 0x33 0 64k", "write -P 0x44 4k 4k")
			refused(t, path, "correct horsf")

			b := readFile(t, path)
			if !bytes.Equal(b[:len(header)], header) {
				t.Error("QEMU changed the header")
			}
			again, info := open(t, b, "correct horse")
			sameInfo(t, info, infoOf(t, path, "luks"))
			size, err := luks.HeaderSize(o)
			if err != nil || size != uint64(len(header)) || info.PayloadOffset != size {
				t.Errorf("header of %d bytes, %d expected, error %v, payload at %d", len(header), size, err, info.PayloadOffset)
			}
			if info.KeySlots[0].Iterations != 1500 || info.MasterKeyIterations != luks.MinIterations {
				t.Errorf("iterations of %+v", info)
			}
			payload := b[size:]
			decrypts(t, again, payload[:4<<10], 0, 0x33)
			decrypts(t, again, payload[4<<10:8<<10], 8, 0x44)
			decrypts(t, c, payload[8<<10:], 16, 0x33)
		})
	}
}

// TestFarSectors crosses sector 2^32, where the IV generators plain and plain64 part.
func TestFarSectors(t *testing.T) {
	const far = 2<<40 - 4096
	for _, iv := range []string{"plain", "plain64", "essiv"} {
		for _, mode := range []string{"xts", "cbc"} {
			if iv == "essiv" && mode == "xts" {
				continue
			}
			t.Run(mode+"-"+iv, func(t *testing.T) {
				header, c := create(t, luks.CreateOptions{Mode: mode, IVGenerator: iv}, "far")
				path := device(t, header, far+8192)
				deviceIO(t, path, "far", fmt.Sprintf("write -P 0x11 %d 8k", int64(far)))
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, 8<<10)
				if _, err := f.ReadAt(p, int64(len(header))+far); err != nil {
					t.Error(err)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
				decrypts(t, c, p, far/512, 0x11)
			})
		}
	}
}

// patched returns a header whose algorithms have other names.
func patched(header []byte, cipher, mode, hash string, keyBytes byte) []byte {
	b := bytes.Clone(header)
	for i, name := range []string{cipher, mode, hash} {
		field := b[8+32*i:][:32]
		clear(field)
		copy(field, name)
	}
	b[111] = keyBytes
	return b
}

// TestQEMUOnly refuses, by name, what QEMU has and this package not, and still tells what qemu-img info does.
func TestQEMUOnly(t *testing.T) {
	header, _ := create(t, luks.CreateOptions{}, "pw")
	for _, c := range []struct {
		cipher, mode, hash string
		keyBytes           byte
		name               string
	}{
		{"serpent", "xts-plain64", "sha256", 64, `cipher "serpent"`},
		{"serpent", "cbc-essiv:sha256", "sha256", 16, `cipher "serpent"`},
		{"cast5", "cbc-plain64", "sha256", 16, `cipher "cast5"`},
		{"aes", "ecb-plain64", "sha256", 32, `mode "ecb"`},
		{"aes", "ctr-plain64", "sha256", 32, `mode "ctr"`},
		{"aes", "xts-plain64", "md5", 64, `hash "md5"`},
		{"aes", "xts-essiv:sha256", "sha256", 64, `IV generator "essiv" in mode xts`},
		{"aes", "cbc-essiv:md5", "sha256", 16, `hash "md5" of the IV generator`},
	} {
		t.Run(c.cipher+"-"+c.mode+"-"+c.hash, func(t *testing.T) {
			b := patched(header, c.cipher, c.mode, c.hash, c.keyBytes)
			info, err := luks.Inspect(b)
			if !errors.Is(err, luks.ErrUnsupported) || !strings.Contains(err.Error(), c.name) {
				t.Errorf("error %v, want one that names %s", err, c.name)
			}
			if info == nil {
				t.Fatal("no info")
			}
			sameInfo(t, info, infoOf(t, device(t, b, 4096), "luks"))
			if _, _, err := luks.Open(t.Context(), b, []byte("pw")); !errors.Is(err, luks.ErrUnsupported) {
				t.Errorf("opened, error %v", err)
			}
		})
	}
}

// TestDefaults makes a header with no options but a shorter measurement, and lets QEMU read it.
func TestDefaults(t *testing.T) {
	header, c, err := luks.Create(t.Context(), []byte("correct horse"), luks.CreateOptions{KeyOptions: luks.KeyOptions{IterTime: 50e6}})
	if err != nil {
		t.Fatal(err)
	}
	info, err := luks.Inspect(header[:luks.PrefixBytes])
	if err != nil {
		t.Fatal(err)
	}
	if info.Cipher != "aes-256" || info.Mode != "xts" || info.IVGenerator != "plain64" || info.Hash != "sha256" || info.KeyBytes != 64 {
		t.Errorf("defaults are %+v", info)
	}
	if n := info.KeySlots[0].Iterations; n < luks.MinIterations || info.MasterKeyIterations != max(n/8, luks.MinIterations) {
		t.Errorf("iterations of %+v", info)
	}
	path := device(t, header, 64<<10)
	deviceIO(t, path, "correct horse", "write -P 0x12 0 64k")
	decrypts(t, c, readFile(t, path)[len(header):], 0, 0x12)
}
