package check

import (
	"fmt"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Severity says what a finding costs.
type Severity uint8

const (
	Leak       Severity = iota // space is lost, data is not
	Corruption                 // data is lost, or a later write may lose it
)

func (s Severity) String() string {
	if s == Leak {
		return "leak"
	}
	return "corruption"
}

// Kind classifies findings.
type Kind uint8

const (
	Leaked         Kind = iota // the refcount of a cluster exceeds its references
	RefcountTooLow             // the refcount of a cluster is below its references: it may be allocated again while in use
	CopiedSet                  // an entry has COPIED, but the refcount is not 1: a write would change what others see
	CopiedMissing              // an entry lacks COPIED, but the refcount is 1: costs a needless copy
	ReservedBits               // an entry has reserved bits set
	Misaligned                 // an entry or a header field points between clusters
	OutsideFile                // an entry or a header field points past the end of the file
	Overlap                    // a cluster of metadata has a second owner
	BadTable                   // a structure cannot be decoded; what it points at shows up as leaked
	BadSubclusters             // the subclusters of an extended L2 entry contradict each other or the entry
	Misplaced                  // a cluster of an external data file is not at its guest offset
	Forbidden                  // compressed clusters or snapshots in an image with an external data file
)

var kindNames = [...]string{
	Leaked:         "leaked cluster",
	RefcountTooLow: "refcount too low",
	CopiedSet:      "COPIED wrongly set",
	CopiedMissing:  "COPIED missing",
	ReservedBits:   "reserved bits set",
	Misaligned:     "misaligned offset",
	OutsideFile:    "reference outside the file",
	Overlap:        "overlap",
	BadTable:       "undecodable",
	BadSubclusters: "contradictory subclusters",
	Misplaced:      "not at its guest offset",
	Forbidden:      "impossible with a data file",
}

func (k Kind) String() string { return kindNames[k] }

// Severity is Leak for Leaked and Corruption for everything else: also for CopiedMissing, which loses nothing, because
// qemu-img check counts it so.
func (k Kind) Severity() Severity {
	if k == Leaked {
		return Leak
	}
	return Corruption
}

// Table names a structure of the image, or what a cluster is used for.
type Table uint8

const (
	Nothing Table = iota
	HeaderCluster
	RefcountTable
	RefcountBlock
	L1Table
	SnapshotTable
	SnapshotL1Table
	BitmapDirectory
	BitmapTable
	BitmapData
	EncryptionHeader
	L2Table
	GuestData
	CompressedData
)

var tableNames = [...]string{
	Nothing:          "unused cluster",
	HeaderCluster:    "header",
	RefcountTable:    "refcount table",
	RefcountBlock:    "refcount block",
	L1Table:          "L1 table",
	SnapshotTable:    "snapshot table",
	SnapshotL1Table:  "snapshot L1 table",
	BitmapDirectory:  "bitmap directory",
	BitmapTable:      "bitmap table",
	BitmapData:       "bitmap data",
	EncryptionHeader: "encryption header",
	L2Table:          "L2 table",
	GuestData:        "guest data",
	CompressedData:   "compressed data",
}

func (t Table) String() string { return tableNames[t] }

// exclusive reports whether a cluster of t has exactly one owner in a valid image.
func (t Table) exclusive() bool { return t >= HeaderCluster && t <= EncryptionHeader }

// Finding is one thing that is wrong with an image.
type Finding struct {
	Kind     Kind
	Severity Severity
	// Table and Offset say where: for Leaked, RefcountTooLow and Overlap the cluster and what it is used for, for the
	// other kinds the entry or field itself and the structure that it is in.
	Table  Table
	Offset format.HostOffset
	Detail string
}

func (f Finding) String() string {
	return fmt.Sprintf("%v: %v: %v at %#x: %s", f.Severity, f.Kind, f.Table, uint64(f.Offset), f.Detail)
}

// Report is what Check found.
type Report struct {
	Findings    []Finding // in the order of discovery, at most Options.MaxFindings; the counts cover all
	Leaks       int       // leaked clusters
	Corruptions int       // findings of severity Corruption

	TotalClusters      int64 // guest clusters of the virtual disk
	AllocatedClusters  int64 // guest clusters with a host cluster, compressed ones included, without snapshots
	FragmentedClusters int64 // those of them not placed right behind their predecessor, and every compressed one
	CompressedClusters int64
	ImageEnd           int64 // end of the last cluster of the file that is in use, in bytes

	Dirty         bool // the header says that refcounts may be wrong and are rebuilt before use
	MarkedCorrupt bool // the header says that corruption was seen before
}

// Clean reports whether there is no finding.
func (r *Report) Clean() bool { return r.Leaks == 0 && r.Corruptions == 0 }

// String lists the counts and the findings, one on each line.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d corruptions, %d leaks", r.Corruptions, r.Leaks)
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "\n%v", f)
	}
	if rest := r.Corruptions + r.Leaks - len(r.Findings); rest > 0 {
		fmt.Fprintf(&b, "\nand %d more", rest)
	}
	return b.String()
}
