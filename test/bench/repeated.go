package main

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
)

// writeRepeated makes a qcow2 image of so many bytes in which every cluster has data, but several share a cluster of the
// file: guest cluster g has the data cluster g modulo their number. So a backing file that is large enough
// for writes that never meet a cluster twice fits into memory. All sizes are bytes, multiples of a cluster.
func writeRepeated(path string, size, data int64, random io.Reader) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return writeTables(f, size, data, random)
}

func writeTables(w io.Writer, size, data int64, random io.Reader) error {
	const (
		perL2       = clusterSize / 8 // entries of an L2 table
		perRefcount = clusterSize / 2 // 16-bit entries of a refcount block
		copiedFlag  = 1 << 63         // the entry's cluster has refcount 1
	)
	guest, shared := size/clusterSize, data/clusterSize
	l2Tables := (guest + perL2 - 1) / perL2
	l1Clusters := (l2Tables*8 + clusterSize - 1) / clusterSize
	// In the file: header, refcount table, refcount blocks, L1 table, L2 tables, data.
	blocks := int64(1)
	for (2+blocks+l1Clusters+l2Tables+shared+perRefcount-1)/perRefcount > blocks {
		blocks++
	}
	l1 := 2 + blocks
	l2 := l1 + l1Clusters
	first := l2 + l2Tables
	total := first + shared

	header := []byte("QFI\xfb")
	for _, field := range []any{
		uint32(3), uint64(0), uint32(0), uint32(16), uint64(size), uint32(0), // version, no backing file, cluster bits, size, no encryption
		uint32(l2Tables), uint64(l1 * clusterSize), uint64(clusterSize), uint32(1), // L1 table, refcount table and its clusters
		uint32(0), uint64(0), uint64(0), uint64(0), uint64(0), uint32(4), uint32(104), // no snapshots, no features, refcount order, header length
	} {
		header, _ = binary.Append(header, binary.BigEndian, field) // numbers always fit
	}
	table := make([]uint64, 0, perL2)
	for i := range blocks {
		table = append(table, uint64(2+i)*clusterSize)
	}
	refcounts := make([]uint16, blocks*perRefcount)
	for i := range total {
		refcounts[i] = 1
		if i >= first {
			refcounts[i] = uint16((guest - (i - first) + shared - 1) / shared)
		}
	}
	l1Table := make([]uint64, l2Tables)
	for i := range l1Table {
		l1Table[i] = uint64(l2+int64(i))*clusterSize | copiedFlag
	}
	l2Table := make([]uint64, guest)
	for i := range l2Table {
		at := first + int64(i)%shared
		l2Table[i] = uint64(at) * clusterSize
		if refcounts[at] == 1 {
			l2Table[i] |= copiedFlag
		}
	}
	for _, part := range []any{header, table, refcounts, l1Table, l2Table} {
		b, err := binary.Append(nil, binary.BigEndian, part)
		if err != nil {
			return err
		}
		if _, err := w.Write(append(b, make([]byte, -len(b)&(clusterSize-1))...)); err != nil {
			return err
		}
	}
	_, err := io.CopyN(w, random, data)
	return err
}
