package repair

import (
	"fmt"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Kind classifies changes.
type Kind uint8

const (
	LeakRepaired      Kind = iota // a refcount that exceeded the references of its cluster was lowered
	LeakKept                      // Leaks only: one was not, because something that cannot be followed may refer to its cluster
	RefcountRaised                // a refcount below the references was raised
	CopiedSet                     // COPIED was missing in an entry of the active tables
	CopiedCleared                 // COPIED was wrong in an entry
	EntryCorrected                // an entry had a fault that leaves no doubt about what it means
	ClusterLost                   // an entry pointed nowhere: its guest cluster reads as zeroes now, in version 2 as unallocated
	TableLost                     // an L1 entry pointed nowhere: what it mapped reads so
	TableMoved                    // a table lay where another structure lies, or was cut off; it has a place of its own now
	TableCopied                   // an L2 table served two parts of the active disk; each has its own now
	DataCopied                    // a guest cluster had more references than a refcount can hold; one of them has a copy now
	SnapshotCorrected             // an entry of the snapshot table lacked what version 3 requires, or had too much
	SnapshotDropped               // a snapshot could not be read
	BitmapsDropped                // the bitmaps were damaged, or would no longer cover every change of the disk
	RefcountsRebuilt              // the refcount table or its blocks were unusable; Detail says why
	MarkCleared                   // the dirty or the corrupt bit
)

var kindNames = [...]string{
	LeakRepaired:      "leak repaired",
	LeakKept:          "leak kept",
	RefcountRaised:    "refcount raised",
	CopiedSet:         "COPIED set",
	CopiedCleared:     "COPIED cleared",
	EntryCorrected:    "entry corrected",
	ClusterLost:       "guest cluster lost",
	TableLost:         "L2 table lost",
	TableMoved:        "table moved",
	TableCopied:       "table copied",
	DataCopied:        "guest cluster copied",
	SnapshotCorrected: "snapshot corrected",
	SnapshotDropped:   "snapshot dropped",
	BitmapsDropped:    "bitmaps dropped",
	RefcountsRebuilt:  "refcounts rebuilt",
	MarkCleared:       "mark cleared",
}

func (k Kind) String() string { return kindNames[k] }

// Table names a structure of the image.
type Table uint8

const (
	Header Table = iota
	RefcountTable
	RefcountBlock
	L1Table
	SnapshotTable
	SnapshotL1Table
	L2Table
	Bitmaps
	Cluster // any host cluster
)

var tableNames = [...]string{
	Header:          "header",
	RefcountTable:   "refcount table",
	RefcountBlock:   "refcount block",
	L1Table:         "L1 table",
	SnapshotTable:   "snapshot table",
	SnapshotL1Table: "snapshot L1 table",
	L2Table:         "L2 table",
	Bitmaps:         "bitmaps",
	Cluster:         "cluster",
}

func (t Table) String() string { return tableNames[t] }

// Change is one thing that was changed.
type Change struct {
	Kind  Kind
	Table Table
	// Offset says where, in the file as it was: of the cluster for refcounts, of the entry or the table for others.
	Offset format.HostOffset
	// Old and New are refcounts, entries, or offsets of tables; 0 where there is nothing of the kind.
	Old, New uint64
	Detail   string
}

func (c Change) String() string {
	s := fmt.Sprintf("%v: %v at %#x", c.Kind, c.Table, uint64(c.Offset))
	if c.Old != c.New {
		s += fmt.Sprintf(": %#x -> %#x", c.Old, c.New)
	}
	if c.Detail != "" {
		s += ": " + c.Detail
	}
	return s
}

// Report is what Run changed, or with Options.DryRun would have changed.
type Report struct {
	Changes []Change // in the order of discovery, at most Options.MaxChanges; the counts cover all

	counts [len(kindNames)]int

	Freed int64 // bytes of the file given back to the file system, in holes or at its end
}

// Count returns the number of changes of the kinds, of all kinds when none is given.
func (r *Report) Count(kinds ...Kind) int {
	n := 0
	if len(kinds) == 0 {
		for _, c := range r.counts {
			n += c
		}
		return n
	}
	for _, k := range kinds {
		n += r.counts[k]
	}
	return n
}

// Leaks returns the number of refcounts that were lowered.
func (r *Report) Leaks() int { return r.Count(LeakRepaired) }

// Raised returns the number of refcounts that were raised.
func (r *Report) Raised() int { return r.Count(RefcountRaised) }

// Corrected returns the number of table entries that were changed.
func (r *Report) Corrected() int {
	return r.Count(CopiedSet, CopiedCleared, EntryCorrected, ClusterLost, TableLost, SnapshotCorrected)
}

// Lost returns the number of structures that could not be saved. If it is 0, what the guest and the snapshots
// could read before they read now.
func (r *Report) Lost() int { return r.Count(ClusterLost, TableLost, SnapshotDropped) }

// Copied returns the number of tables and guest clusters that were copied to a place of their own.
func (r *Report) Copied() int { return r.Count(TableMoved, TableCopied, DataCopied) }

// Clean reports whether there was nothing to do.
func (r *Report) Clean() bool { return r.Count() == 0 }

// String lists the counts and the changes, one on each line.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d changes", r.Count())
	for k, n := range r.counts {
		if n > 0 {
			fmt.Fprintf(&b, ", %v: %d", Kind(k), n)
		}
	}
	for _, c := range r.Changes {
		fmt.Fprintf(&b, "\n%v", c)
	}
	if rest := r.Count() - len(r.Changes); rest > 0 {
		fmt.Fprintf(&b, "\nand %d more", rest)
	}
	return b.String()
}
