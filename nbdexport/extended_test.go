package nbdexport_test

import (
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// TestLongRequests has requests about more than 32 bits can count, on the largest export there is.
func TestLongRequests(t *testing.T) {
	const size = 1<<63 - 512
	type op = nbdtest.Operation
	const gib = 1 << 30
	b := &hollow{info: nbdexport.Info{Size: size, MinimumBlock: 512, Contexts: []string{nbdexport.ContextAllocation}}}
	client := connectIn(t, nbdtest.Extended, b, nbdexport.ContextAllocation)
	unmap := nbdexport.Zeroing{MayUnmap: true}
	for name, test := range map[string]struct {
		request nbdtest.Request
		want    syscall.Errno
		ops     []op
	}{
		"trim of more than 2 GiB": {
			nbdtest.Request{Command: nbdtest.CmdTrim, Offset: 512, Length: 2*gib + 512},
			0,
			[]op{
				{Kind: nbdtest.Discard, Offset: 512, Length: gib},
				{Kind: nbdtest.Discard, Offset: gib + 512, Length: gib},
				{Kind: nbdtest.Discard, Offset: 2*gib + 512, Length: 512},
			},
		},
		"zeroes of 5 GiB, durable": {
			nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFUA, Offset: size - 5*gib, Length: 5 * gib},
			0,
			[]op{
				{Kind: nbdtest.WriteZeroes, Offset: size - 5*gib, Length: gib, How: unmap},
				{Kind: nbdtest.WriteZeroes, Offset: size - 4*gib, Length: gib, How: unmap},
				{Kind: nbdtest.WriteZeroes, Offset: size - 3*gib, Length: gib, How: unmap},
				{Kind: nbdtest.WriteZeroes, Offset: size - 2*gib, Length: gib, How: unmap},
				{Kind: nbdtest.WriteZeroes, Offset: size - gib, Length: gib, How: unmap},
				{Kind: nbdtest.Flush},
			},
		},
		"status of everything": {
			nbdtest.Request{Command: nbdtest.CmdBlockStatus, Length: size},
			0,
			[]op{{Kind: nbdtest.Describe, Length: size, Context: nbdexport.ContextAllocation}},
		},
		"read of the last sector": {
			nbdtest.Request{Command: nbdtest.CmdRead, Offset: size - 512, Length: 512},
			0,
			[]op{{Kind: nbdtest.Read, Offset: size - 512, Length: 512}},
		},
		"trim past the end":          {nbdtest.Request{Command: nbdtest.CmdTrim, Offset: 512, Length: size}, syscall.EINVAL, nil},
		"zeroes past the end":        {nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Offset: 512, Length: size}, syscall.ENOSPC, nil},
		"status past the end":        {nbdtest.Request{Command: nbdtest.CmdBlockStatus, Offset: 512, Length: size}, syscall.EINVAL, nil},
		"trim that wraps around":     {nbdtest.Request{Command: nbdtest.CmdTrim, Offset: size, Length: 1<<63 + 512}, syscall.EINVAL, nil},
		"zeroes that wrap around":    {nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Offset: 1<<64 - 512, Length: 512}, syscall.ENOSPC, nil},
		"read at 2^63":               {nbdtest.Request{Command: nbdtest.CmdRead, Offset: 1 << 63, Length: 512}, syscall.EINVAL, nil},
		"read at 2^63, back a block": {nbdtest.Request{Command: nbdtest.CmdRead, Offset: size, Length: 512}, syscall.EINVAL, nil},
		"status at 2^64":             {nbdtest.Request{Command: nbdtest.CmdBlockStatus, Offset: 1<<64 - 512, Length: 1 << 63}, syscall.EINVAL, nil},
	} {
		reply := client.Exchange(test.request)
		if reply.Errno() != test.want {
			t.Errorf("%s: %v, want %v", name, reply.Err, test.want)
		}
		if got := b.take(); !slices.Equal(got, test.ops) {
			t.Errorf("%s: the backend saw %+v, want %+v", name, got, test.ops)
		}
	}
	client.Disconnect()
}

// TestPayloadTooLong has a payload that is longer than the server has said it takes: with extended headers that ends the
// connection, as does the magic of the other kind of header.
func TestPayloadTooLong(t *testing.T) {
	for name, r := range map[string]nbdtest.Request{
		"write":        {Command: nbdtest.CmdWrite, Length: 32<<20 + 1},
		"write of all": {Command: nbdtest.CmdWrite, Length: 1<<64 - 1},
		"read":         {Command: nbdtest.CmdRead, Flags: nbdtest.FlagPayloadLen, Length: 1 << 32},
		"status":       {Command: nbdtest.CmdBlockStatus, Flags: nbdtest.FlagPayloadLen, Length: 1 << 63},
		"magic":        {Magic: nbdtest.RequestMagic, Command: nbdtest.CmdRead},
	} {
		t.Run(name, func(t *testing.T) {
			b := &hollow{info: nbdexport.Info{Size: 1 << 40}}
			client := connectIn(t, nbdtest.Extended, b)
			client.Send(r.EncodeIn(nbdtest.Extended))
			client.ReceiveEnd()
			if ops := b.take(); ops != nil {
				t.Errorf("the backend saw %+v", ops)
			}
		})
	}
	t.Run("compact", func(t *testing.T) {
		client := connectIn(t, nbdtest.Structured, newMemory(mib))
		client.Send(nbdtest.Request{Magic: nbdtest.ExtendedRequestMagic, Length: 512}.Encode())
		client.ReceiveEnd()
	})
}

// TestFastZero has a backend that zeroes fast only what is aligned to 4096 bytes.
func TestFastZero(t *testing.T) {
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		b := nbdtest.NewMemory(nbdexport.Info{Size: mib, FastZero: true})
		var never atomic.Bool
		b.Before = func(op nbdtest.Operation) error {
			if op.How.Fast && (op.Offset|op.Length)%4096 != 0 || never.Load() && op.Kind != nbdtest.Flush {
				return syscall.ENOTSUP
			}
			return nil
		}
		client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", offer(b)))
		if e := client.GoIn(style, ""); e.Flags&nbdexport.FlagSendFastZero == 0 {
			t.Errorf("flags %#x", e.Flags)
		}
		for _, test := range []struct {
			flags       uint16
			off, length uint64
			want        syscall.Errno
		}{
			{nbdtest.FlagFastZero, 4096, 8192, 0},
			{nbdtest.FlagFastZero | nbdtest.FlagNoHole | nbdtest.FlagFUA, 4096, 8192, 0},
			{nbdtest.FlagFastZero, 4096, 512, syscall.ENOTSUP},
			{0, 4096, 512, 0},
			{nbdtest.FlagFastZero, mib, 4096, syscall.ENOSPC},
		} {
			r := nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Flags: test.flags, Offset: test.off, Length: test.length}
			reply := client.Exchange(r)
			if reply.Errno() != test.want {
				t.Errorf("%+v: %v", test, reply.Err)
			}
		}
		// Errors of that number have this meaning for nothing else.
		never.Store(true)
		for _, command := range []uint16{nbdtest.CmdWriteZeroes, nbdtest.CmdTrim, nbdtest.CmdRead, nbdtest.CmdCache} {
			r := nbdtest.Request{Command: command, Length: 512}
			if reply := client.Exchange(r); reply.Errno() != syscall.EIO {
				t.Errorf("command %d: %v, want EIO", command, reply.Err)
			}
		}
	})
}
