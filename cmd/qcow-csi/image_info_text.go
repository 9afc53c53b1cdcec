package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
)

// printInfos prints infos for people, in the form of qemu-img info.
func printInfos(w io.Writer, infos []*imageInfo) error {
	var text []string
	for _, i := range infos {
		text = append(text, i.text())
	}
	_, err := io.WriteString(w, strings.Join(text, "\n"))
	return err
}

func (i *imageInfo) text() string {
	var b strings.Builder
	line := func(format string, args ...any) { b.WriteString(printable(fmt.Sprintf(format, args...)) + "\n") }
	line("image: %s", i.Filename)
	line("file format: %s", i.Format)
	line("virtual size: %s (%d bytes)", humanSize(i.VirtualSize), i.VirtualSize)
	line("disk size: %s", humanSize(i.ActualSize))
	if i.Encrypted {
		line("encrypted: yes")
	}
	if i.ClusterSize != 0 {
		line("cluster_size: %d", i.ClusterSize)
	}
	if i.Dirty {
		line("cleanly shut down: no")
	}
	if i.Backing != "" {
		if i.FullBacking == i.Backing {
			line("backing file: %s", i.Backing)
		} else {
			line("backing file: %s (actual path: %s)", i.Backing, i.FullBacking)
		}
	}
	if i.BackingFormat != "" {
		line("backing file format: %s", i.BackingFormat)
	}
	if len(i.Snapshots) > 0 {
		line("Snapshot list:")
		b.WriteString(snapshotTable(i.Snapshots))
	}
	if i.Specific != nil {
		line("Format specific information:")
		i.Specific.Data.print(line)
	}
	return b.String()
}

func (i *qcow2Info) print(line func(string, ...any)) {
	line("    compat: %s", i.Compat)
	line("    compression type: %s", i.CompressionType)
	if i.LazyRefcounts != nil {
		line("    lazy refcounts: %t", *i.LazyRefcounts)
	}
	if len(i.Bitmaps) > 0 {
		line("    bitmaps:")
	}
	for n, b := range i.Bitmaps {
		line("        [%d]:", n)
		line("            flags:")
		for k, f := range b.Flags {
			line("                [%d]: %s", k, f)
		}
		line("            name: %s", b.Name)
		line("            granularity: %d", b.Granularity)
	}
	line("    refcount bits: %d", i.RefcountBits)
	if i.Encrypt != nil {
		line("    encrypt:")
		i.Encrypt.print(line)
	}
	if i.DataFile != "" {
		line("    data file: %s", i.DataFile)
	}
	for _, flag := range []struct {
		name string
		set  *bool
	}{{"data file raw", i.DataFileRaw}, {"corrupt", i.Corrupt}, {"extended l2", i.ExtendedL2}} {
		if flag.set != nil {
			line("    %s: %t", flag.name, *flag.set)
		}
	}
}

func (i *encryptInfo) print(line func(string, ...any)) {
	line("        format: %s", i.Format)
	for _, property := range [][2]string{
		{"cipher alg", i.Cipher},
		{"cipher mode", i.CipherMode},
		{"ivgen alg", i.IVGenerator},
		{"ivgen hash alg", i.IVGeneratorHash},
		{"hash alg", i.Hash},
		{"uuid", i.UUID},
	} {
		if property[1] != "" {
			line("        %s: %s", property[0], property[1])
		}
	}
	if len(i.Slots) == 0 {
		return
	}
	line("        slots:")
	for n, s := range i.Slots {
		line("            [%d]:", n)
		line("                active: %t", s.Active)
		if s.Active {
			line("                iters: %d", s.Iterations)
		}
		line("                key offset: %d", s.KeyOffset)
		if s.Active {
			line("                stripes: %d", s.Stripes)
		}
	}
	line("        payload offset: %d", i.PayloadOffset)
	line("        master key iters: %d", i.MasterKeyIters)
}

// printable returns s without what a terminal would obey: names in an image may be anybody's.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// snapshotTable lists snapshots for people, one on each line.
func snapshotTable(list []snapshotInfo) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range list {
		icount := ""
		if s.ICount != nil {
			icount = fmt.Sprint(*s.ICount)
		}
		clock := fmt.Sprintf("%02d:%02d:%02d.%03d", s.ClockSec/3600, s.ClockSec/60%60, s.ClockSec%60, s.ClockNsec/1e6)
		date := time.Unix(int64(s.Seconds), int64(s.Nanoseconds)).Format("2006-01-02 15:04:05")
		fmt.Fprintf(&b, "%-9s %-16s %8s%20s%13s%11s\n", printable(s.ID), printable(s.Name), humanSize(int64(s.VMStateSize)), date, clock, icount)
	}
	return b.String()
}
