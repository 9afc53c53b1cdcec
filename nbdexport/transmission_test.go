package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// journal keeps the operations of a backend.
type journal struct {
	mu  sync.Mutex
	ops []nbdtest.Operation
}

func (j *journal) note(op nbdtest.Operation) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ops = append(j.ops, op)
	return nil
}

// take returns the operations since the last take.
func (j *journal) take() []nbdtest.Operation {
	j.mu.Lock()
	defer j.mu.Unlock()
	ops := j.ops
	j.ops = nil
	return ops
}

// TestRequests sends every command with everything that can be right or wrong about it, and looks at the answer and at
// what reaches the backend.
func TestRequests(t *testing.T) {
	const size = 64 << 20
	const huge = 32<<20 + 512
	type (
		request = nbdtest.Request
		op      = nbdtest.Operation
	)
	read := func(off, n int64) []op { return []op{{Kind: nbdtest.Read, Offset: off, Length: n}} }
	write := func(off, n int64) []op { return []op{{Kind: nbdtest.Write, Offset: off, Length: n}} }
	flushed := func(ops []op) []op { return append(ops, op{Kind: nbdtest.Flush}) }
	zeroes := func(off, n int64, mayUnmap bool) []op {
		return []op{{Kind: nbdtest.WriteZeroes, Offset: off, Length: n, MayUnmap: mayUnmap}}
	}
	discard := func(off, n int64) []op { return []op{{Kind: nbdtest.Discard, Offset: off, Length: n}} }

	const (
		inval = syscall.EINVAL
		nospc = syscall.ENOSPC
		perm  = syscall.EPERM
		none  = syscall.Errno(0)
	)
	const (
		cmdRead, cmdWrite, cmdFlush    = nbdtest.CmdRead, nbdtest.CmdWrite, nbdtest.CmdFlush
		cmdTrim, cmdZero, fua, noHoles = nbdtest.CmdTrim, nbdtest.CmdWriteZeroes, nbdtest.FlagFUA, nbdtest.FlagNoHole
	)
	for name, test := range map[string]struct {
		request  request
		want     syscall.Errno
		ops      []op
		readOnly syscall.Errno // the answer of a read-only export
	}{
		"read":                       {request{Command: cmdRead, Offset: 512, Length: 1024}, none, read(512, 1024), none},
		"read of the last block":     {request{Command: cmdRead, Offset: size - 512, Length: 512}, none, read(size-512, 512), none},
		"read of 32 MiB":             {request{Command: cmdRead, Length: 32 << 20}, none, read(0, 32<<20), none},
		"read with FUA":              {request{Command: cmdRead, Flags: fua, Length: 512}, none, read(0, 512), none},
		"read of nothing":            {request{Command: cmdRead, Offset: 512}, none, nil, none},
		"read of nothing at the end": {request{Command: cmdRead, Offset: size}, none, nil, none},
		"read past the end":          {request{Command: cmdRead, Offset: size - 512, Length: 1024}, inval, nil, inval},
		"read beyond the end":        {request{Command: cmdRead, Offset: size + 512, Length: 512}, inval, nil, inval},
		"read at 2^64":               {request{Command: cmdRead, Offset: 1<<64 - 512, Length: 1024}, inval, nil, inval},
		"read of too much":           {request{Command: cmdRead, Length: huge}, inval, nil, inval},
		"read of 4 GiB":              {request{Command: cmdRead, Length: 1<<32 - 512}, inval, nil, inval},
		"read of part of a block":    {request{Command: cmdRead, Length: 511}, inval, nil, inval},
		"read at part of a block":    {request{Command: cmdRead, Offset: 1, Length: 512}, inval, nil, inval},
		"read without holes":         {request{Command: cmdRead, Flags: noHoles, Length: 512}, inval, nil, inval},
		"read without fragments":     {request{Command: cmdRead, Flags: nbdtest.FlagDF, Length: 512}, inval, nil, inval},

		"write":                  {request{Command: cmdWrite, Offset: 512, Length: 1024}, none, write(512, 1024), perm},
		"write of 32 MiB":        {request{Command: cmdWrite, Offset: 512, Length: 32 << 20}, none, write(512, 32<<20), perm},
		"write with FUA":         {request{Command: cmdWrite, Flags: fua, Length: 512}, none, flushed(write(0, 512)), perm},
		"write of nothing":       {request{Command: cmdWrite}, none, nil, perm},
		"write past the end":     {request{Command: cmdWrite, Offset: size - 512, Length: 1024}, nospc, nil, perm},
		"write at 2^64":          {request{Command: cmdWrite, Offset: 1<<64 - 512, Length: 1024}, nospc, nil, perm},
		"write of too much":      {request{Command: cmdWrite, Length: huge}, inval, nil, perm},
		"write at part of block": {request{Command: cmdWrite, Offset: 1, Length: 512}, inval, nil, perm},
		"write part of a block":  {request{Command: cmdWrite, Length: 1}, inval, nil, perm},
		"write without holes":    {request{Command: cmdWrite, Flags: noHoles, Length: 512}, inval, nil, perm},
		"write with flag 15":     {request{Command: cmdWrite, Flags: 1 << 15, Length: 512}, inval, nil, perm},

		"flush":             {request{Command: cmdFlush}, none, []op{{Kind: nbdtest.Flush}}, none},
		"flush with FUA":    {request{Command: cmdFlush, Flags: fua}, none, []op{{Kind: nbdtest.Flush}}, none},
		"flush with offset": {request{Command: cmdFlush, Offset: 512}, inval, nil, inval},
		"flush with length": {request{Command: cmdFlush, Length: 512}, inval, nil, inval},
		"flush with flag":   {request{Command: cmdFlush, Flags: noHoles}, inval, nil, inval},

		"trim":                    {request{Command: cmdTrim, Offset: 512, Length: 4096}, none, discard(512, 4096), perm},
		"trim of everything":      {request{Command: cmdTrim, Length: size}, none, discard(0, size), perm},
		"trim with FUA":           {request{Command: cmdTrim, Flags: fua, Length: 512}, none, flushed(discard(0, 512)), perm},
		"trim of nothing":         {request{Command: cmdTrim}, none, nil, perm},
		"trim past the end":       {request{Command: cmdTrim, Offset: size, Length: 512}, inval, nil, perm},
		"trim of part of a block": {request{Command: cmdTrim, Length: 100}, inval, nil, perm},
		"trim without holes":      {request{Command: cmdTrim, Flags: noHoles, Length: 512}, inval, nil, perm},

		"zeroes":              {request{Command: cmdZero, Offset: 512, Length: 512}, none, zeroes(512, 512, true), perm},
		"zeroes everywhere":   {request{Command: cmdZero, Length: size}, none, zeroes(0, size, true), perm},
		"zeroes, no holes":    {request{Command: cmdZero, Flags: noHoles, Length: 512}, none, zeroes(0, 512, false), perm},
		"zeroes with FUA":     {request{Command: cmdZero, Flags: fua, Length: 512}, none, flushed(zeroes(0, 512, true)), perm},
		"zeroes of nothing":   {request{Command: cmdZero}, none, nil, perm},
		"zeroes past the end": {request{Command: cmdZero, Offset: 512, Length: size}, nospc, nil, perm},
		"zeroes unaligned":    {request{Command: cmdZero, Offset: 512, Length: 513}, inval, nil, perm},
		"zeroes, only fast":   {request{Command: cmdZero, Flags: 1 << 4, Length: 512}, inval, nil, perm},

		"cache":         {request{Command: nbdtest.CmdCache, Length: 512}, inval, nil, inval},
		"block status":  {request{Command: nbdtest.CmdBlockStatus, Length: 512}, inval, nil, inval},
		"resize":        {request{Command: 8, Length: 512}, inval, nil, inval},
		"command 65535": {request{Command: 65535, Length: 512}, inval, nil, inval},
	} {
		for _, readOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/readOnly=%t", name, readOnly), func(t *testing.T) {
				var j journal
				b := nbdtest.NewMemory(nbdexport.Info{Size: size, MinimumBlock: 512, ReadOnly: readOnly})
				b.Before = j.note
				client := connect(t, b)

				want, ops := test.want, test.ops
				if readOnly && test.readOnly != none {
					want, ops = test.readOnly, nil
				}
				r := test.request
				if r.Command == cmdWrite {
					r.Payload = bytes.Repeat([]byte{0xa5}, int(r.Length))
				}
				if _, err := client.Do(r); want == none && err != nil || want != none && !errors.Is(err, want) {
					t.Errorf("answer: %v, want %v", err, want)
				}
				if got := j.take(); !slices.Equal(got, ops) {
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

func TestErrorsOfTheBackend(t *testing.T) {
	for _, test := range []struct{ is, want error }{
		{syscall.ENOSPC, syscall.ENOSPC},
		{syscall.EDQUOT, syscall.ENOSPC},
		{syscall.EFBIG, syscall.ENOSPC},
		{syscall.EINVAL, syscall.EINVAL},
		{syscall.EPERM, syscall.EPERM},
		{syscall.EROFS, syscall.EPERM},
		{syscall.EIO, syscall.EIO},
		{syscall.ENOMEM, syscall.EIO},
		{syscall.EAGAIN, syscall.EIO},
		{io.EOF, syscall.EIO},
		{io.ErrUnexpectedEOF, syscall.EIO},
		{net.ErrClosed, syscall.EIO},
		{errors.New("of the backend's own"), syscall.EIO},
	} {
		t.Run(test.is.Error(), func(t *testing.T) {
			b := newMemory(mib)
			b.Before = func(nbdtest.Operation) error { return fmt.Errorf("backend: %w", test.is) }
			client := transmit(t, b)
			for _, r := range []nbdtest.Request{
				{Command: nbdtest.CmdRead, Length: 512},
				{Command: nbdtest.CmdRead, Length: 256 << 10},
				{Command: nbdtest.CmdWrite, Length: 512, Payload: make([]byte, 512)},
				{Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Length: 512, Payload: make([]byte, 512)},
				{Command: nbdtest.CmdFlush},
				{Command: nbdtest.CmdTrim, Length: 512},
				{Command: nbdtest.CmdWriteZeroes, Length: 512},
			} {
				if data, err := client.Do(r); !errors.Is(err, test.want) || len(data) != 0 {
					t.Errorf("command %d: %v and %d bytes, want %v", r.Command, err, len(data), test.want)
				}
			}
			client.Disconnect()
		})
	}
}

// TestFUAFails has writes that arrive, and a flush that fails.
func TestFUAFails(t *testing.T) {
	b := newMemory(mib)
	b.Before = func(op nbdtest.Operation) error {
		if op.Kind == nbdtest.Flush {
			return syscall.EIO
		}
		return nil
	}
	client := transmit(t, b)
	for _, r := range []nbdtest.Request{
		{Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Length: 512, Payload: make([]byte, 512)},
		{Command: nbdtest.CmdTrim, Flags: nbdtest.FlagFUA, Length: 512},
		{Command: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFUA, Length: 512},
	} {
		if _, err := client.Do(r); !errors.Is(err, syscall.EIO) {
			t.Errorf("command %d with FUA: %v, want EIO", r.Command, err)
		}
		r.Flags = 0
		if _, err := client.Do(r); err != nil {
			t.Errorf("command %d: %v", r.Command, err)
		}
	}
}

// TestShortRead has a backend that breaks its promise to fill the buffer.
func TestShortRead(t *testing.T) {
	client := connect(t, shortReads{newMemory(mib)})
	for _, n := range []int{512, 256 << 10} {
		if _, err := client.ReadBytes(0, n); !errors.Is(err, syscall.EIO) {
			t.Errorf("read of %d bytes: %v, want EIO", n, err)
		}
	}
	client.Disconnect()
}

type shortReads struct{ nbdexport.Backend }

func (shortReads) ReadAt(p []byte, _ int64) (int, error) { return len(p) - 1, io.EOF }

func TestContents(t *testing.T) {
	b := newMemory(4 * mib)
	client := connect(t, b)
	want := make([]byte, 4*mib)
	// Sizes around the limits of the buffers, at odd places.
	for i, n := range []int{1, 511, 4096, 64<<10 - 1, 64 << 10, 64<<10 + 1, 128 << 10, 256<<10 + 1, mib} {
		off := i * 300_001
		p := bytes.Repeat([]byte{byte(i + 1)}, n)
		copy(want[off:], p)
		if err := client.WriteBytes(uint64(off), p); err != nil {
			t.Fatalf("write of %d bytes: %v", n, err)
		}
		got, err := client.ReadBytes(uint64(off), n)
		if err != nil || !bytes.Equal(got, p) {
			t.Fatalf("read of %d bytes: %v, equal: %t", n, err, bytes.Equal(got, p))
		}
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Error("contents differ")
	}
	client.Disconnect()
}

// TestGrows has an export that grows under its client.
func TestGrows(t *testing.T) {
	b := newMemory(mib)
	client := connect(t, b)
	if err := client.WriteBytes(mib, make([]byte, 512)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write past the end: %v", err)
	}
	b.Grow(2 * mib)
	if err := client.WriteBytes(mib, []byte("more")); err != nil {
		t.Errorf("write after growing: %v", err)
	}
	if got, err := client.ReadBytes(mib, 4); err != nil || string(got) != "more" {
		t.Errorf("read after growing: %q, %v", got, err)
	}
	if _, err := client.ReadBytes(2*mib-1, 2); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("read past the new end: %v", err)
	}
	client.Disconnect()
}

// TestManyInFlight sends a mix of requests without waiting for replies, quick ones and ones for workers, and takes the
// replies in whatever order they come.
func TestManyInFlight(t *testing.T) {
	const each, rounds = 96 << 10, 64 // twice the limit of what the receiver does itself, and a half
	b := newMemory(rounds * each)
	client := connect(t, b)
	lengths := []int{512, 4096, each, 64 << 10, 20 << 10}

	go func() {
		for i := range rounds {
			n := lengths[i%len(lengths)]
			r := nbdtest.Request{
				Command: nbdtest.CmdWrite, Cookie: uint64(i), Offset: uint64(i) * each, Length: uint32(n),
				Payload: bytes.Repeat([]byte{byte(i + 1)}, n),
			}
			if _, err := client.Write(r.Encode()); err != nil {
				t.Error(err)
			}
		}
	}()
	noData := func(uint64) int { return 0 }
	seen := make(map[uint64]bool)
	for range rounds {
		cookie, _, err := client.ReceiveReply(noData)
		if err != nil || seen[cookie] {
			t.Fatalf("write %d: %v, seen before: %t", cookie, err, seen[cookie])
		}
		seen[cookie] = true
	}

	go func() {
		for i := range rounds {
			n := lengths[i%len(lengths)]
			r := nbdtest.Request{Command: nbdtest.CmdRead, Cookie: uint64(i), Offset: uint64(i) * each, Length: uint32(n)}
			if _, err := client.Write(r.Encode()); err != nil {
				t.Error(err)
			}
		}
	}()
	for range rounds {
		cookie, got, err := client.ReceiveReply(func(cookie uint64) int { return lengths[cookie%uint64(len(lengths))] })
		if want := bytes.Repeat([]byte{byte(cookie + 1)}, len(got)); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %d: %v, or other data", cookie, err)
		}
	}
	client.Disconnect()
}

// TestSlowRequestsHoldUpNoOthers lets a read wait for one that is behind it on the same connection.
func TestSlowRequestsHoldUpNoOthers(t *testing.T) {
	const first, second = 0, 512 << 10
	for name, slow := range map[string]nbdtest.Request{
		"flush":       {Command: nbdtest.CmdFlush},
		"large read":  {Command: nbdtest.CmdRead, Length: 256 << 10},
		"large write": {Command: nbdtest.CmdWrite, Length: 256 << 10, Payload: make([]byte, 256<<10)},
		"trim":        {Command: nbdtest.CmdTrim, Length: 4096},
		"zeroes":      {Command: nbdtest.CmdWriteZeroes, Length: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			released := make(chan struct{})
			b := newMemory(mib)
			b.Before = func(op nbdtest.Operation) error {
				if op.Offset == second {
					close(released)
				} else {
					<-released
				}
				return nil
			}
			client := connect(t, b)
			slow.Cookie = first
			client.Send(slow.Encode(), nbdtest.Request{Command: nbdtest.CmdRead, Cookie: second, Offset: second, Length: 512}.Encode())
			got := make(map[uint64]bool)
			for range 2 {
				cookie, _, err := client.ReceiveReply(func(cookie uint64) int {
					switch {
					case cookie == second:
						return 512
					case slow.Command == nbdtest.CmdRead:
						return int(slow.Length)
					}
					return 0
				})
				if err != nil {
					t.Error(err)
				}
				got[cookie] = true
			}
			if !reflect.DeepEqual(got, map[uint64]bool{first: true, second: true}) {
				t.Errorf("replies %v", got)
			}
			client.Disconnect()
		})
	}
}

// TestSlowBackendServesInParallel has small reads that all wait until several of them are there.
func TestSlowBackendServesInParallel(t *testing.T) {
	const together = 8
	var mu sync.Mutex
	waiting, all := 0, make(chan struct{})
	b := newMemory(mib)
	b.Before = func(op nbdtest.Operation) error {
		if op.Offset == 0 {
			return nil
		}
		mu.Lock()
		if waiting++; waiting == together {
			close(all)
		}
		mu.Unlock()
		<-all
		return nil
	}
	client := connect(t, slowReads{b})
	// The server learns that this backend is slow.
	for range 64 {
		if _, err := client.ReadBytes(0, 512); err != nil {
			t.Fatal(err)
		}
	}
	var batch []byte
	for i := range together {
		batch = append(batch, nbdtest.Request{Command: nbdtest.CmdRead, Cookie: uint64(i), Offset: 512, Length: 512}.Encode()...)
	}
	client.Send(batch)
	for range together {
		if _, _, err := client.ReceiveReply(func(uint64) int { return 512 }); err != nil {
			t.Fatal(err)
		}
	}
	client.Disconnect()
}

// slowReads is a backend that takes a millisecond and more for a read.
type slowReads struct{ nbdexport.Backend }

func (s slowReads) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(time.Millisecond)
	return s.Backend.ReadAt(p, off)
}

// TestNoAllocationPerRequest has a warm connection: serving must go on when the kernel, which may be writing back to
// this very export, has no memory to give.
func TestNoAllocationPerRequest(t *testing.T) {
	client := connect(t, newMemory(mib))
	for _, r := range []nbdtest.Request{
		{Command: nbdtest.CmdRead, Length: 4096},
		{Command: nbdtest.CmdRead, Length: 256 << 10},
		{Command: nbdtest.CmdWrite, Length: 4096, Payload: make([]byte, 4096)},
		{Command: nbdtest.CmdWrite, Length: 256 << 10, Payload: make([]byte, 256<<10)},
		{Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Length: 4096, Payload: make([]byte, 4096)},
		{Command: nbdtest.CmdTrim, Length: 4096},
		{Command: nbdtest.CmdFlush},
	} {
		request, reply := r.Encode(), make([]byte, 16)
		if r.Command == nbdtest.CmdRead {
			reply = make([]byte, 16+r.Length)
		}
		n := testing.AllocsPerRun(200, func() {
			if _, err := client.Write(request); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, reply); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("command %d, %d bytes: %v allocations for a request", r.Command, r.Length, n)
		}
	}
}
