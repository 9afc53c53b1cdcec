package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"
)

// sparse is a device of zeroes with one odd byte, which either differs or cannot be read.
type sparse struct {
	size int64
	odd  int64
	err  error
	read int64 // bytes read
}

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off+int64(len(p)) > s.size {
		return int(max(s.size-off, 0)), io.EOF
	}
	s.read += int64(len(p))
	if off <= s.odd && s.odd < off+int64(len(p)) {
		if s.err != nil {
			return int(s.odd - off), s.err
		}
		p[s.odd-off] = 1
	}
	return len(p), nil
}

func TestBlankReadsWhereSignaturesStand(t *testing.T) {
	const tib = int64(1) << 40
	for _, place := range []struct {
		name      string
		size, odd int64
	}{
		{"first sector", tib, 0},
		{"ext4", tib, 1024 + 56},
		{"ISO 9660", tib, 32<<10 + 1},
		{"btrfs", tib, 64<<10 + 64},
		{"UDF", tib, 1 << 20},
		{"second LUKS header", tib, 4 << 20},
		{"ext4 backup, 1 KiB blocks", tib, 8<<20 + 1024 + 56},
		{"btrfs, first copy", tib, 64<<20 + 64},
		{"btrfs, first copy, at the end", 64<<20 + 128, 64<<20 + 64},
		{"ext4 backup, 4 KiB blocks", tib, 128<<20 + 56},
		{"btrfs, second copy", tib, 256<<30 + 64},
		{"zfs label 2", tib, tib - 512<<10},
		{"md 0.90", tib, tib - 64<<10},
		{"md 1.0", tib, tib - 8<<10},
		{"firmware RAID", tib, tib - 3087*512},
		{"GPT backup", tib, tib - 512},
		{"last byte", tib, tib - 1},
		{"small device", 12345 * 512, 12345*512 - 1},
		{"device of the size of head and tail", 32 << 20, 16 << 20},
	} {
		t.Run(place.name, func(t *testing.T) {
			if blank, err := isBlank(t.Context(), &sparse{size: place.size, odd: -1}, place.size); err != nil || !blank {
				t.Errorf("all zeroes: %t, %v", blank, err)
			}
			if blank, err := isBlank(t.Context(), &sparse{size: place.size, odd: place.odd}, place.size); err != nil || blank {
				t.Errorf("with data: %t, %v", blank, err)
			}
			blank, err := isBlank(t.Context(), &sparse{size: place.size, odd: place.odd, err: syscall.EIO}, place.size)
			if !errors.Is(err, ErrUnreadable) || !errors.Is(err, syscall.EIO) || blank {
				t.Errorf("with a read error: %t, %v", blank, err)
			}
		})
	}
}

func TestBlankIsBoundedAndStops(t *testing.T) {
	device := &sparse{size: 1 << 50, odd: -1}
	if blank, err := isBlank(t.Context(), device, device.size); err != nil || !blank {
		t.Fatal(blank, err)
	}
	if device.read > 33<<20 {
		t.Errorf("read %d bytes of a large device", device.read)
	}
	// A device that is shorter than it says.
	short := &sparse{size: 8 << 20, odd: -1}
	if blank, err := isBlank(t.Context(), short, 1<<30); !errors.Is(err, ErrUnreadable) || blank {
		t.Errorf("short device: %t, %v", blank, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if blank, err := isBlank(ctx, device, device.size); !errors.Is(err, context.Canceled) || blank {
		t.Errorf("cancelled: %t, %v", blank, err)
	}
}

func TestParseBlkid(t *testing.T) {
	for _, test := range []struct {
		output string
		want   Content
	}{
		{"DEVNAME=/dev/nbd0\nTYPE=ext4\n", Content{Type: "ext4"}},
		{"DEVNAME=/dev/nbd0\nPTTYPE=gpt\n", Content{Type: "partition-table:gpt"}},
		{"DEVNAME=/dev/nbd0\nTYPE=vfat\nPTTYPE=dos\n", Content{Type: "vfat"}},
		{"DEVNAME=/dev/nbd0\n", Content{}},
		{"nonsense", Content{}},
		{"", Content{}},
	} {
		t.Run(fmt.Sprintf("%q", test.output), func(t *testing.T) {
			if got := parseBlkid(test.output); got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}
