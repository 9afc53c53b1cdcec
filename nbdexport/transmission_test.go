package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

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
			forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
				client := connectRoughly(t, style, b)
				for _, r := range []nbdtest.Request{
					{Command: nbdtest.CmdRead, Length: 512},
					{Command: nbdtest.CmdRead, Length: 256 << 10},
					{Command: nbdtest.CmdWrite, Length: 512, Payload: make([]byte, 512)},
					{Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Length: 512, Payload: make([]byte, 512)},
					{Command: nbdtest.CmdFlush},
					{Command: nbdtest.CmdTrim, Length: 512},
					{Command: nbdtest.CmdWriteZeroes, Length: 512},
					{Command: nbdtest.CmdCache, Length: 512},
				} {
					if data, err := client.Do(r); !errors.Is(err, test.want) || len(data) != 0 {
						t.Errorf("command %d: %v and %d bytes, want %v", r.Command, err, len(data), test.want)
					}
				}
				client.Disconnect()
			})
		})
	}
}

// TestFUAFails has writes that arrive, and a flush that fails.
func TestFUAFails(t *testing.T) {
	b := newMemory(mib)
	b.Before = func(op nbdtest.Operation) error {
		if op.Kind == nbdtest.Flush || op.Kind == nbdtest.WriteSync {
			return syscall.EIO
		}
		return nil
	}
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectRoughly(t, style, b)
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
	})
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
	lengths := []int{512, 4096, each, 64 << 10, 20 << 10}

	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, newMemory(rounds*each))
		exchange := func(command uint16, check func(*nbdtest.Reply) error) {
			var requests []byte
			for i := range rounds {
				n := lengths[i%len(lengths)]
				r := nbdtest.Request{Command: command, Cookie: uint64(i), Offset: uint64(i) * each, Length: uint64(n)}
				if command == nbdtest.CmdWrite {
					r.Payload = bytes.Repeat([]byte{byte(i + 1)}, n)
				}
				client.Expect(r)
				requests = append(requests, r.EncodeIn(style)...)
			}
			go func() {
				if _, err := client.Write(requests); err != nil {
					t.Error(err)
				}
			}()
			for range rounds {
				if reply := client.Await(); reply.Err != nil || check(reply) != nil {
					t.Fatalf("request %d: %v, %v", reply.Cookie, reply.Err, check(reply))
				}
			}
		}
		exchange(nbdtest.CmdWrite, func(*nbdtest.Reply) error { return nil })
		exchange(nbdtest.CmdRead, func(reply *nbdtest.Reply) error {
			if want := bytes.Repeat([]byte{byte(reply.Cookie + 1)}, len(reply.Data)); !bytes.Equal(reply.Data, want) {
				return errors.New("other data")
			}
			return nil
		})
		client.Disconnect()
	})
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
			client.Post(slow, nbdtest.Request{Command: nbdtest.CmdRead, Cookie: second, Offset: second, Length: 512})
			for range 2 {
				if reply := client.Await(); reply.Err != nil {
					t.Errorf("reply: %+v", reply)
				}
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
	var batch []nbdtest.Request
	for i := range together {
		batch = append(batch, nbdtest.Request{Command: nbdtest.CmdRead, Cookie: uint64(i), Offset: 512, Length: 512})
	}
	client.Post(batch...)
	for range together {
		if reply := client.Await(); reply.Err != nil {
			t.Fatal(reply.Err)
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

// TestFirstRepliesDoNotWaitForTheLast has a client that sends many requests at once, and a backend that is not done with the last one before the
// client has the first replies.
func TestFirstRepliesDoNotWaitForTheLast(t *testing.T) {
	const requests = 16
	arrived := make(chan struct{})
	b := newMemory(mib)
	b.Before = func(op nbdtest.Operation) error {
		if op.Offset == (requests-1)*512 {
			<-arrived
		}
		return nil
	}
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		arrived = make(chan struct{})
		client := connectIn(t, style, b)
		var all []nbdtest.Request
		for i := range uint64(requests) {
			all = append(all, nbdtest.Request{Command: nbdtest.CmdRead, Cookie: i, Offset: i * 512, Length: 512})
		}
		client.Post(all...)
		for i := range requests {
			if i == requests/2 {
				close(arrived)
			}
			if reply := client.Await(); reply.Err != nil {
				t.Fatal(reply.Err)
			}
		}
		client.Disconnect()
	})
}
