package luks_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// qemuImage makes an encrypted qcow2 image of QEMU's and returns its path.
func qemuImage(t testing.TB, passphrase, options string, size int64) string {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	args := append([]string{"create", "-q", "-f", "qcow2"}, secret("s", passphrase)...)
	qemu(t, "qemu-img", append(args, "-o", options, path, strconv.FormatInt(size, 10))...)
	return path
}

// image is an image in memory with just enough sense to find clusters.
type image struct {
	t     testing.TB
	bytes []byte
	h     *format.Header
}

func readImage(t testing.TB, path string) image {
	t.Helper()
	b := readFile(t, path)
	h, err := format.DecodeHeader(b[:min(len(b), 1<<format.MaxClusterBits)])
	if err != nil {
		t.Fatal(err)
	}
	return image{t, b, h}
}

// luksHeader returns where the LUKS header is, and its bytes.
func (m image) luksHeader() (uint64, []byte) {
	m.t.Helper()
	for _, e := range m.h.Extensions {
		if e.Type == format.ExtFullDisk {
			off, n := binary.BigEndian.Uint64(e.Data), binary.BigEndian.Uint64(e.Data[8:])
			return off, m.bytes[off:][:n]
		}
	}
	m.t.Fatal("no full disk encryption header pointer")
	return 0, nil
}

// cluster returns the host offset of a guest cluster, and its bytes.
func (m image) cluster(guest uint64) (uint64, []byte) {
	m.t.Helper()
	size := m.h.ClusterSize()
	perL2 := size / 8
	l2 := binary.BigEndian.Uint64(m.bytes[uint64(m.h.L1Offset)+guest/perL2*8:]) & 0x00fffffffffffe00
	off := binary.BigEndian.Uint64(m.bytes[l2+guest%perL2*8:]) & 0x00fffffffffffe00
	if l2 == 0 || off == 0 {
		m.t.Fatalf("guest cluster %d has no host cluster", guest)
	}
	return off, m.bytes[off:][:size]
}

func luksImage(path string) string {
	return "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=" + path
}

// TestImage reads encrypted qcow2 images that QEMU made and wrote, writes into them, and then gives them another
// header that was made here: QEMU reads all of it.
func TestImage(t *testing.T) {
	for _, c := range []struct {
		clusterSize uint64
		o           luks.CreateOptions
	}{
		{64 << 10, luks.CreateOptions{}},
		{4 << 10, luks.CreateOptions{Cipher: "aes-128", Mode: "cbc", IVGenerator: "essiv", IVHash: "sha256", Hash: "sha512"}},
		{2 << 20, luks.CreateOptions{Cipher: "aes-192", IVGenerator: "plain", Hash: "sha1"}},
	} {
		if c.clusterSize > 64<<10 && !long() {
			continue
		}
		t.Run(fmt.Sprint(c.clusterSize), func(t *testing.T) {
			t.Parallel()
			size := c.clusterSize
			path := qemuImage(t, "correct horse", fmt.Sprintf("cluster_size=%d,encrypt.format=luks,%s", size, qemuOptions("encrypt.", c.o)), 16<<20)
			imageIO(t, luksImage(path), "correct horse", fmt.Sprintf("write -P 0x5a %d %d", size, size), fmt.Sprintf("write -P 0xa5 0 %d", size))

			m := readImage(t, path)
			at, header := m.luksHeader()
			cipher, info := open(t, header, "correct horse")
			sameInfo(t, info, infoOf(t, path, "qcow2"))
			if n, err := luks.HeaderSize(c.o); err != nil || n != uint64(len(header)) || n != info.PayloadOffset {
				t.Errorf("header of %d bytes, error %v; the image's has %d, payload offset %d", n, err, len(header), info.PayloadOffset)
			}
			for guest, plain := range []byte{0xa5, 0x5a} {
				off, p := m.cluster(uint64(guest))
				decrypts(t, cipher, p, off/512, plain)
			}
			off, p := m.cluster(1)
			copy(p, bytes.Repeat([]byte{0x77}, int(size)))
			cipher.Encrypt(p, off/512)
			writeAt(t, path, int64(off), p)
			imageIO(t, luksImage(path), "correct horse", fmt.Sprintf("read -P 0xa5 0 %d", size), fmt.Sprintf("read -P 0x77 %d %d", size, size))

			ours, cipher := create(t, c.o, "battery staple")
			writeAt(t, path, int64(at), ours)
			for guest, plain := range []byte{0x21, 0x42} {
				off, p := m.cluster(uint64(guest))
				copy(p, bytes.Repeat([]byte{plain}, int(size)))
				cipher.Encrypt(p, off/512)
				writeAt(t, path, int64(off), p)
			}
			imageIO(t, luksImage(path), "battery staple", fmt.Sprintf("read -P 0x21 0 %d", size), fmt.Sprintf("read -P 0x42 %d %d", size, size),
				fmt.Sprintf("write -P 0x63 %d %d", 2*size, size))
			m = readImage(t, path)
			off, p = m.cluster(2)
			decrypts(t, cipher, p, off/512, 0x63)
			qemu(t, "qemu-img", append([]string{"check", "-q"}, append(secret("s", "battery staple"), "--image-opts", luksImage(path))...)...)
		})
	}
}

// TestLegacyAES reads and writes images with encryption method 1, whose sectors are counted in the guest.
func TestLegacyAES(t *testing.T) {
	for _, password := range []string{"pw", "exactly 16 bytes", "longer than sixteen bytes"} {
		t.Run(password, func(t *testing.T) {
			path := qemuImage(t, password, "encrypt.format=aes,encrypt.key-secret=s", 1<<20)
			driver := "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,file.filename=" + path
			imageIO(t, driver, password, "write -P 0x5a 320k 64k", "write -P 0xa5 0 64k")
			m := readImage(t, path)
			if m.h.CryptMethod != 1 {
				t.Errorf("encryption method %d", m.h.CryptMethod)
			}
			c, err := luks.LegacyAES([]byte(password))
			if err != nil {
				t.Fatal(err)
			}
			for guest, plain := range map[uint64]byte{0: 0xa5, 5: 0x5a} {
				_, p := m.cluster(guest)
				decrypts(t, c, p, guest*128, plain)
			}
			p := bytes.Repeat([]byte{0x77}, 32<<10)
			c.Encrypt(p, 5*128+3)
			off, _ := m.cluster(5)
			writeAt(t, path, int64(off)+3*512, p)
			imageIO(t, driver, password, "read -P 0x77 321.5k 32k", "read -P 0x5a 320k 1536")
		})
	}
}
