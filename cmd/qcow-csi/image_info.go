package main

import (
	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

func newImageInfoCommand() *cobra.Command {
	var wholeChain bool
	cmd := &cobra.Command{
		Use:   "info IMAGE [--backing-chain] [-U] [--output human|json]",
		Short: "Show the properties of an image",
		Long: `Show the properties of an image, its snapshots and its bitmaps. The disk size is the space that the file takes on its file system.

No file but the image is opened, and no passphrase is needed. With --backing-chain the files behind it follow.
In JSON the names are those of qemu-img info.`,
		Example: `  qcow-csi image info disk.qcow2
  qcow-csi image info --output json disk.qcow2 | jq '."virtual-size"'
  qcow-csi image info --backing-chain overlay.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	var a access
	addShareFlag(cmd, &a)
	cmd.Flags().BoolVar(&wholeChain, "backing-chain", false, "show the backing files too")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		chain, err := a.readChain(args[0], wholeChain)
		if err != nil {
			return err
		}
		var infos []*imageInfo
		for _, l := range chain {
			i, err := l.info()
			if err != nil {
				return err
			}
			infos = append(infos, i)
		}
		switch {
		case *output == outputJSON && wholeChain:
			return writeJSON(cmd.OutOrStdout(), infos)
		case *output == outputJSON:
			return writeJSON(cmd.OutOrStdout(), infos[0])
		}
		return printInfos(cmd.OutOrStdout(), infos)
	}
	return cmd
}

// imageInfo is what qemu-img info --output=json prints.
type imageInfo struct {
	VirtualSize   int64           `json:"virtual-size"`
	Filename      string          `json:"filename"`
	ClusterSize   int             `json:"cluster-size,omitempty"`
	Format        string          `json:"format"`
	ActualSize    int64           `json:"actual-size"`
	Encrypted     bool            `json:"encrypted,omitempty"`
	Specific      *formatSpecific `json:"format-specific,omitempty"`
	Backing       string          `json:"backing-filename,omitempty"`
	FullBacking   string          `json:"full-backing-filename,omitempty"`
	BackingFormat string          `json:"backing-filename-format,omitempty"`
	Snapshots     []snapshotInfo  `json:"snapshots,omitempty"`
	Dirty         bool            `json:"dirty-flag"`
}

type formatSpecific struct {
	Type string    `json:"type"`
	Data qcow2Info `json:"data"`
}

// qcow2Info has pointers for what an image of version 2 does not have at all.
type qcow2Info struct {
	Compat          string       `json:"compat"`
	CompressionType string       `json:"compression-type"`
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps         []bitmapInfo `json:"bitmaps,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	Encrypt         *encryptInfo `json:"encrypt,omitempty"`
	DataFile        string       `json:"data-file,omitempty"`
	DataFileRaw     *bool        `json:"data-file-raw,omitempty"`
	Corrupt         *bool        `json:"corrupt,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
}

type snapshotInfo struct {
	ID          string  `json:"id"`
	Name        string  `json:"name"`
	VMStateSize uint64  `json:"vm-state-size"`
	Seconds     uint32  `json:"date-sec"`
	Nanoseconds uint32  `json:"date-nsec"`
	ClockSec    uint64  `json:"vm-clock-sec"`
	ClockNsec   uint64  `json:"vm-clock-nsec"`
	ICount      *uint64 `json:"icount,omitempty"`
}

type bitmapInfo struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"`
}

type encryptInfo struct {
	Format          string     `json:"format"`
	IVGenerator     string     `json:"ivgen-alg,omitempty"`
	IVGeneratorHash string     `json:"ivgen-hash-alg,omitempty"`
	Hash            string     `json:"hash-alg,omitempty"`
	Cipher          string     `json:"cipher-alg,omitempty"`
	CipherMode      string     `json:"cipher-mode,omitempty"`
	UUID            string     `json:"uuid,omitempty"`
	Slots           []slotInfo `json:"slots,omitempty"`
	PayloadOffset   uint64     `json:"payload-offset,omitempty"`
	MasterKeyIters  uint32     `json:"master-key-iters,omitempty"`
}

type slotInfo struct {
	Active     bool   `json:"active"`
	Iterations uint32 `json:"iters,omitempty"`
	KeyOffset  uint64 `json:"key-offset"`
	Stripes    uint32 `json:"stripes,omitempty"`
}

// info describes a file of a chain.
func (l *layer) info() (*imageInfo, error) {
	i := &imageInfo{VirtualSize: l.size, Filename: l.path, Format: l.format, ActualSize: l.allocated}
	h := l.headers
	if h == nil {
		return i, nil
	}
	i.ClusterSize = int(h.ClusterSize())
	i.Encrypted = h.CryptMethod != 0
	i.Backing, i.FullBacking, i.BackingFormat = h.BackingFile, l.backing(), h.BackingFormat()
	i.Dirty = h.Incompatible&format.IncompatDirty != 0
	for n := range h.snapshots {
		i.Snapshots = append(i.Snapshots, describeSnapshot(&h.snapshots[n]))
	}
	i.Specific = &formatSpecific{Type: formatQcow2, Data: h.describe()}
	var err error
	i.Specific.Data.Encrypt, err = h.describeEncryption()
	return i, err
}

// describe returns what is special to the format, but for the encryption.
func (h *headers) describe() qcow2Info {
	i := qcow2Info{Compat: "1.1", CompressionType: "zlib", RefcountBits: int(h.RefcountBits())}
	if h.CompressionType == 1 {
		i.CompressionType = "zstd"
	}
	for _, b := range h.bitmaps {
		i.Bitmaps = append(i.Bitmaps, describeBitmap(b))
	}
	if h.Version == 2 {
		i.Compat = "0.10"
		return i
	}
	is := func(set bool) *bool { return &set }
	i.LazyRefcounts = is(h.Compatible&format.CompatLazyRefcounts != 0)
	i.Corrupt = is(h.Incompatible&format.IncompatCorrupt != 0)
	i.ExtendedL2 = is(h.ExtendedL2)
	if h.DataFile {
		i.DataFile = h.DataFileName()
		i.DataFileRaw = is(h.Autoclear&format.AutoclearRawDataFile != 0)
	}
	return i
}

func describeSnapshot(s *format.Snapshot) snapshotInfo {
	i := snapshotInfo{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, Seconds: s.Seconds, Nanoseconds: s.Nanoseconds,
		ClockSec: s.VMClock / 1e9, ClockNsec: s.VMClock % 1e9,
	}
	if s.ICount != ^uint64(0) {
		i.ICount = &s.ICount
	}
	return i
}

func describeBitmap(b format.Bitmap) bitmapInfo {
	i := bitmapInfo{Name: b.Name, Granularity: 1 << b.GranularityBits, Flags: []string{}}
	if b.Flags&format.BitmapInUse != 0 {
		i.Flags = append(i.Flags, "in-use")
	}
	if b.Flags&format.BitmapAuto != 0 {
		i.Flags = append(i.Flags, "auto")
	}
	return i
}

// describeEncryption returns nil where the image is not encrypted.
func (h *headers) describeEncryption() (*encryptInfo, error) {
	switch {
	case h.CryptMethod == 0:
		return nil, nil //nolint:nilnil // there is none, and that is no error
	case h.luks == nil:
		return &encryptInfo{Format: "aes"}, nil
	}
	k, err := luks.Inspect(h.luks)
	if k == nil {
		return nil, err
	}
	// Algorithms that the engine does not have are no reason to tell nothing.
	i := &encryptInfo{
		Format: "luks", IVGenerator: k.IVGenerator, IVGeneratorHash: k.IVHash, Hash: k.Hash, Cipher: k.Cipher, CipherMode: k.Mode,
		UUID: k.UUID, PayloadOffset: k.PayloadOffset, MasterKeyIters: k.MasterKeyIterations,
	}
	for _, s := range k.KeySlots {
		slot := slotInfo{Active: s.Active, KeyOffset: s.KeyOffset}
		if s.Active {
			slot.Iterations, slot.Stripes = s.Iterations, s.Stripes
		}
		i.Slots = append(i.Slots, slot)
	}
	return i, nil
}
