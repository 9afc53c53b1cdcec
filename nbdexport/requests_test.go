package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// TestRequests sends every command with everything that can be right or wrong about it, in every style, and looks at the
// answer and at what reaches the backend.
func TestRequests(t *testing.T) {
	const size = 64 << 20
	const huge = 32<<20 + 512
	type (
		request = nbdtest.Request
		op      = nbdtest.Operation
	)
	read := func(off, n int64) []op { return []op{{Kind: nbdtest.Read, Offset: off, Length: n}} }
	write := func(off, n int64) []op { return []op{{Kind: nbdtest.Write, Offset: off, Length: n}} }
	durable := func(off, n int64) []op { return []op{{Kind: nbdtest.WriteSync, Offset: off, Length: n}} }
	flushed := func(ops []op) []op { return append(ops, op{Kind: nbdtest.Flush}) }
	zeroes := func(off, n int64, mayUnmap bool) []op {
		return []op{{Kind: nbdtest.WriteZeroes, Offset: off, Length: n, How: nbdexport.Zeroing{MayUnmap: mayUnmap}}}
	}
	discard := func(off, n int64) []op { return []op{{Kind: nbdtest.Discard, Offset: off, Length: n}} }

	const (
		inval = syscall.EINVAL
		nospc = syscall.ENOSPC
		perm  = syscall.EPERM
		none  = syscall.Errno(0)

		overflow = syscall.EOVERFLOW
	)
	simple, compact := []nbdtest.Style{nbdtest.Simple}, []nbdtest.Style{nbdtest.Simple, nbdtest.Structured}
	chunked, extended := []nbdtest.Style{nbdtest.Structured, nbdtest.Extended}, []nbdtest.Style{nbdtest.Extended}
	cached := func(n int64) (ops []op) {
		for off := int64(0); off < n; off += 256 << 10 {
			ops = append(ops, op{Kind: nbdtest.Read, Offset: off, Length: 256 << 10})
		}
		return ops
	}
	const (
		cmdRead, cmdWrite, cmdFlush    = nbdtest.CmdRead, nbdtest.CmdWrite, nbdtest.CmdFlush
		cmdTrim, cmdZero, fua, noHoles = nbdtest.CmdTrim, nbdtest.CmdWriteZeroes, nbdtest.FlagFUA, nbdtest.FlagNoHole
		payload                        = nbdtest.FlagPayloadLen
	)
	for name, test := range map[string]struct {
		request  request
		want     syscall.Errno
		ops      []op
		readOnly syscall.Errno   // the answer of a read-only export
		styles   []nbdtest.Style // nil: all
	}{
		"read":                           {request{Command: cmdRead, Offset: 512, Length: 1024}, none, read(512, 1024), none, nil},
		"read of the last block":         {request{Command: cmdRead, Offset: size - 512, Length: 512}, none, read(size-512, 512), none, nil},
		"read of 32 MiB":                 {request{Command: cmdRead, Length: 32 << 20}, none, read(0, 32<<20), none, nil},
		"read with FUA":                  {request{Command: cmdRead, Flags: fua, Length: 512}, none, read(0, 512), none, nil},
		"read of nothing":                {request{Command: cmdRead, Offset: 512}, none, nil, none, nil},
		"read of nothing at the end":     {request{Command: cmdRead, Offset: size}, none, nil, none, nil},
		"read past the end":              {request{Command: cmdRead, Offset: size - 512, Length: 1024}, inval, nil, inval, nil},
		"read beyond the end":            {request{Command: cmdRead, Offset: size + 512, Length: 512}, inval, nil, inval, nil},
		"read at 2^64":                   {request{Command: cmdRead, Offset: 1<<64 - 512, Length: 1024}, inval, nil, inval, nil},
		"read of too much":               {request{Command: cmdRead, Length: huge}, inval, nil, inval, simple},
		"read of too much, in chunks":    {request{Command: cmdRead, Length: huge}, overflow, nil, overflow, chunked},
		"read of 4 GiB":                  {request{Command: cmdRead, Length: 1<<32 - 512}, inval, nil, inval, simple},
		"read of 4 GiB, in chunks":       {request{Command: cmdRead, Length: 1<<32 - 512}, overflow, nil, overflow, chunked},
		"read of 2^63":                   {request{Command: cmdRead, Length: 1 << 63}, overflow, nil, overflow, extended},
		"read of 2^64":                   {request{Command: cmdRead, Length: 1<<64 - 512}, overflow, nil, overflow, extended},
		"read past the end, at 2^63":     {request{Command: cmdRead, Offset: 1<<63 - 512, Length: 1024}, inval, nil, inval, nil},
		"read of part of a block":        {request{Command: cmdRead, Length: 511}, inval, nil, inval, nil},
		"read at part of a block":        {request{Command: cmdRead, Offset: 1, Length: 512}, inval, nil, inval, nil},
		"read without holes":             {request{Command: cmdRead, Flags: noHoles, Length: 512}, inval, nil, inval, nil},
		"read without fragments":         {request{Command: cmdRead, Flags: nbdtest.FlagDF, Length: 512}, inval, nil, inval, simple},
		"read whole":                     {request{Command: cmdRead, Flags: nbdtest.FlagDF, Length: 512}, none, read(0, 512), none, chunked},
		"read whole of 32 MiB":           {request{Command: cmdRead, Flags: nbdtest.FlagDF, Length: 32 << 20}, none, read(0, 32<<20), none, chunked},
		"read whole, too much":           {request{Command: cmdRead, Flags: nbdtest.FlagDF, Length: huge}, overflow, nil, overflow, chunked},
		"read with a payload":            {request{Command: cmdRead, Flags: payload, Length: 512, Payload: make([]byte, 512)}, inval, nil, inval, extended},
		"read, payload flag":             {request{Command: cmdRead, Flags: payload, Length: 512}, inval, nil, inval, compact},
		"read of nothing with a payload": {request{Command: cmdRead, Flags: payload}, inval, nil, inval, extended},

		"write":                        {request{Command: cmdWrite, Offset: 512, Length: 1024}, none, write(512, 1024), perm, nil},
		"write of 32 MiB":              {request{Command: cmdWrite, Offset: 512, Length: 32 << 20}, none, write(512, 32<<20), perm, nil},
		"write with FUA":               {request{Command: cmdWrite, Flags: fua, Length: 512}, none, durable(0, 512), perm, nil},
		"write of nothing":             {request{Command: cmdWrite}, none, nil, perm, nil},
		"write past the end":           {request{Command: cmdWrite, Offset: size - 512, Length: 1024}, nospc, nil, perm, nil},
		"write at 2^64":                {request{Command: cmdWrite, Offset: 1<<64 - 512, Length: 1024}, nospc, nil, perm, nil},
		"write of too much, in chunks": {request{Command: cmdWrite, Length: huge}, inval, nil, perm, []nbdtest.Style{nbdtest.Structured}},
		"write without its payload":    {request{Command: cmdWrite, Length: 512, AsIs: true}, inval, nil, perm, extended},
		"write without 2^63 bytes":     {request{Command: cmdWrite, Length: 1 << 63, AsIs: true}, inval, nil, perm, extended},
		"write, payload flag":          {request{Command: cmdWrite, Flags: payload, Length: 512}, inval, nil, perm, compact},
		"write of nothing, no payload": {request{Command: cmdWrite, AsIs: true}, inval, nil, perm, extended},
		"write of too much":            {request{Command: cmdWrite, Length: huge}, inval, nil, perm, simple},
		"write at part of block":       {request{Command: cmdWrite, Offset: 1, Length: 512}, inval, nil, perm, nil},
		"write part of a block":        {request{Command: cmdWrite, Length: 1}, inval, nil, perm, nil},
		"write without holes":          {request{Command: cmdWrite, Flags: noHoles, Length: 512}, inval, nil, perm, nil},
		"write with flag 15":           {request{Command: cmdWrite, Flags: 1 << 15, Length: 512}, inval, nil, perm, nil},

		"flush":             {request{Command: cmdFlush}, none, []op{{Kind: nbdtest.Flush}}, none, nil},
		"flush with FUA":    {request{Command: cmdFlush, Flags: fua}, none, []op{{Kind: nbdtest.Flush}}, none, nil},
		"flush with offset": {request{Command: cmdFlush, Offset: 512}, inval, nil, inval, nil},
		"flush with length": {request{Command: cmdFlush, Length: 512}, inval, nil, inval, nil},
		"flush with flag":   {request{Command: cmdFlush, Flags: noHoles}, inval, nil, inval, nil},

		"flush with a payload": {request{Command: cmdFlush, Flags: payload, Length: 8, Payload: make([]byte, 8)}, inval, nil, inval, extended},

		"trim":                    {request{Command: cmdTrim, Offset: 512, Length: 4096}, none, discard(512, 4096), perm, nil},
		"trim of everything":      {request{Command: cmdTrim, Length: size}, none, discard(0, size), perm, nil},
		"trim with FUA":           {request{Command: cmdTrim, Flags: fua, Length: 512}, none, flushed(discard(0, 512)), perm, nil},
		"trim of nothing":         {request{Command: cmdTrim}, none, nil, perm, nil},
		"trim past the end":       {request{Command: cmdTrim, Offset: size, Length: 512}, inval, nil, perm, nil},
		"trim of part of a block": {request{Command: cmdTrim, Length: 100}, inval, nil, perm, nil},
		"trim of 2^32 bytes":      {request{Command: cmdTrim, Length: 1 << 32}, inval, nil, perm, extended},
		"trim of 2^64 bytes":      {request{Command: cmdTrim, Offset: 512, Length: 1<<64 - 512}, inval, nil, perm, extended},
		"trim with a payload":     {request{Command: cmdTrim, Flags: payload, Length: 512, Payload: make([]byte, 512)}, inval, nil, perm, extended},
		"trim without holes":      {request{Command: cmdTrim, Flags: noHoles, Length: 512}, inval, nil, perm, nil},

		"zeroes":                {request{Command: cmdZero, Offset: 512, Length: 512}, none, zeroes(512, 512, true), perm, nil},
		"zeroes everywhere":     {request{Command: cmdZero, Length: size}, none, zeroes(0, size, true), perm, nil},
		"zeroes, no holes":      {request{Command: cmdZero, Flags: noHoles, Length: 512}, none, zeroes(0, 512, false), perm, nil},
		"zeroes with FUA":       {request{Command: cmdZero, Flags: fua, Length: 512}, none, flushed(zeroes(0, 512, true)), perm, nil},
		"zeroes of nothing":     {request{Command: cmdZero}, none, nil, perm, nil},
		"zeroes past the end":   {request{Command: cmdZero, Offset: 512, Length: size}, nospc, nil, perm, nil},
		"zeroes unaligned":      {request{Command: cmdZero, Offset: 512, Length: 513}, inval, nil, perm, nil},
		"zeroes of 2^32 bytes":  {request{Command: cmdZero, Length: 1 << 32}, nospc, nil, perm, extended},
		"zeroes of 2^64 bytes":  {request{Command: cmdZero, Offset: 512, Length: 1<<64 - 512}, nospc, nil, perm, extended},
		"zeroes with a payload": {request{Command: cmdZero, Flags: payload, Length: 512, Payload: make([]byte, 512)}, inval, nil, perm, extended},
		"zeroes, only fast":     {request{Command: cmdZero, Flags: 1 << 4, Length: 512}, inval, nil, perm, nil},

		"cache":                {request{Command: nbdtest.CmdCache, Length: 512}, none, read(0, 512), none, nil},
		"cache too much":       {request{Command: nbdtest.CmdCache, Length: huge}, overflow, nil, overflow, nil},
		"cache of 32 MiB":      {request{Command: nbdtest.CmdCache, Length: 32 << 20}, none, cached(32 << 20), none, nil},
		"cache of nothing":     {request{Command: nbdtest.CmdCache, Offset: size}, none, nil, none, nil},
		"cache past the end":   {request{Command: nbdtest.CmdCache, Offset: size, Length: 512}, inval, nil, inval, nil},
		"cache unaligned":      {request{Command: nbdtest.CmdCache, Offset: 1, Length: 512}, inval, nil, inval, nil},
		"cache with FUA":       {request{Command: nbdtest.CmdCache, Flags: fua, Length: 512}, none, read(0, 512), none, nil},
		"cache, one":           {request{Command: nbdtest.CmdCache, Flags: nbdtest.FlagReqOne, Length: 512}, inval, nil, inval, nil},
		"cache of 2^64":        {request{Command: nbdtest.CmdCache, Length: 1<<64 - 512}, overflow, nil, overflow, extended},
		"cache with a payload": {request{Command: nbdtest.CmdCache, Flags: payload, Length: 512, Payload: make([]byte, 512)}, inval, nil, inval, extended},

		"block status":           {request{Command: nbdtest.CmdBlockStatus, Length: 512}, inval, nil, inval, nil},
		"block status, payload":  {request{Command: nbdtest.CmdBlockStatus, Flags: payload, Length: 12, Payload: make([]byte, 12)}, inval, nil, inval, extended},
		"resize":                 {request{Command: 8, Length: 512}, inval, nil, inval, nil},
		"command with a payload": {request{Command: 77, Flags: payload, Length: 1 << 20, Payload: make([]byte, 1<<20)}, inval, nil, inval, extended},
		"command 65535":          {request{Command: 65535, Length: 512}, inval, nil, inval, nil},
	} {
		styles := test.styles
		if styles == nil {
			styles = nbdtest.Styles
		}
		for _, style := range styles {
			for _, readOnly := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%v/readOnly=%t", name, style, readOnly), func(t *testing.T) {
					b := &hollow{info: nbdexport.Info{Size: size, MinimumBlock: 512, ReadOnly: readOnly}}
					client := connectIn(t, style, b)
					want, ops := test.want, test.ops
					if readOnly && test.readOnly != none {
						want, ops = test.readOnly, nil
					}
					r := test.request
					if r.Command == cmdWrite && !r.AsIs {
						r.Payload = bytes.Repeat([]byte{0xa5}, int(r.Length))
					}
					if _, err := client.Do(r); want == none && err != nil || want != none && !errors.Is(err, want) {
						t.Errorf("answer: %v, want %v", err, want)
					}
					if got := b.take(); !slices.Equal(got, ops) {
						t.Errorf("the backend saw %+v, want %+v", got, ops)
					}
					if got, err := client.ReadBytes(512, 512); err != nil || len(got) != 512 {
						t.Errorf("read afterwards: %v", err)
					}
					client.Disconnect()
				})
			}
		}
	}
}
