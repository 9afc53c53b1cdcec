package nbdexport_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// twoExports are a default export and a named one with a description.
func twoExports() nbdexport.Config {
	return nbdexport.Config{Exports: []nbdexport.Export{
		{Name: "disk", Description: "a disk", Backend: newMemory(mib)},
		{Name: "größer", Backend: nbdtest.NewMemory(nbdexport.Info{
			Size: 2 * mib, MinimumBlock: 512, PreferredBlock: 65536, ReadOnly: true, MultiConn: true,
		})},
	}}
}

func greeted(t *testing.T) *nbdtest.Client {
	t.Helper()
	client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", twoExports()))
	if flags := client.Greet(3); flags != 3 {
		t.Fatalf("handshake flags %#x, want fixed newstyle and no zeroes", flags)
	}
	return client
}

func TestOptionIsAnswered(t *testing.T) {
	blockSize := func(minimum, preferred uint32) []byte {
		return nbdtest.Message(uint16(nbdtest.InfoBlockSize), minimum, preferred, uint32(32<<20))
	}
	export := func(size uint64, flags uint16) []byte {
		return nbdtest.Message(uint16(nbdtest.InfoExport), size, flags)
	}
	const writable, readOnlyMulti = 0x46d, 0x507
	ack := nbdtest.OptionReply{Type: nbdtest.RepAck}
	info := func(data []byte) nbdtest.OptionReply {
		return nbdtest.OptionReply{Type: nbdtest.RepInfo, Data: data}
	}
	for name, test := range map[string]struct {
		option uint32
		data   []byte
		want   []nbdtest.OptionReply // of errors, only the type is looked at
	}{
		"list": {nbdtest.OptList, nil, []nbdtest.OptionReply{
			{Type: nbdtest.RepServer, Data: nbdtest.Message(uint32(4), "disk", "a disk")},
			{Type: nbdtest.RepServer, Data: nbdtest.Message(uint32(8), "größer")},
			ack,
		}},
		"info default": {nbdtest.OptInfo, nbdtest.InfoRequest(""), []nbdtest.OptionReply{
			info(export(mib, writable)), info(blockSize(1, 4096)), ack,
		}},
		"info named": {nbdtest.OptInfo, nbdtest.InfoRequest("größer"), []nbdtest.OptionReply{
			info(export(2*mib, readOnlyMulti)), info(blockSize(512, 65536)), ack,
		}},
		"info everything": {
			nbdtest.OptInfo,
			nbdtest.InfoRequest("", nbdtest.InfoExport, nbdtest.InfoName, nbdtest.InfoDescription, nbdtest.InfoBlockSize),
			[]nbdtest.OptionReply{
				info(export(mib, writable)), info(blockSize(1, 4096)),
				info(nbdtest.Message(uint16(nbdtest.InfoName), "disk")),
				info(nbdtest.Message(uint16(nbdtest.InfoDescription), "a disk")),
				ack,
			},
		},
		"info without description": {
			nbdtest.OptInfo,
			nbdtest.InfoRequest("größer", nbdtest.InfoDescription, nbdtest.InfoName),
			[]nbdtest.OptionReply{
				info(export(2*mib, readOnlyMulti)), info(blockSize(512, 65536)),
				info(nbdtest.Message(uint16(nbdtest.InfoName), "größer")), ack,
			},
		},
		"info of unknown types": {nbdtest.OptInfo, nbdtest.InfoRequest("disk", 4, 0xffff, 4), []nbdtest.OptionReply{
			info(export(mib, writable)), info(blockSize(1, 4096)), ack,
		}},
		"info of unknown export": {nbdtest.OptInfo, nbdtest.InfoRequest("nowhere"), []nbdtest.OptionReply{
			{Type: nbdtest.RepErrUnknown},
		}},
		"go to unknown export": {nbdtest.OptGo, nbdtest.InfoRequest("disk\x00"), []nbdtest.OptionReply{
			{Type: nbdtest.RepErrUnknown},
		}},
		"info without data":      {nbdtest.OptInfo, nil, invalid},
		"go without count":       {nbdtest.OptGo, nbdtest.Message(uint32(4), "disk"), invalid},
		"go with a byte more":    {nbdtest.OptGo, append(nbdtest.InfoRequest("disk"), 0), invalid},
		"go with an item less":   {nbdtest.OptGo, nbdtest.Message(uint32(4), "disk", uint16(2), uint16(3)), invalid},
		"go with a huge name":    {nbdtest.OptGo, nbdtest.Message(uint32(1<<32-1), "disk", uint16(0)), invalid},
		"go with a name beyond":  {nbdtest.OptGo, nbdtest.Message(uint32(5), "disk", uint16(0)), invalid},
		"go with a name of 4097": {nbdtest.OptGo, nbdtest.InfoRequest(strings.Repeat("x", 4097)), invalid},
		"list with data":         {nbdtest.OptList, []byte{0}, invalid},
		"list with much data":    {nbdtest.OptList, make([]byte, 1<<20), invalid},
		"info with much data":    {nbdtest.OptInfo, make([]byte, 1<<20), []nbdtest.OptionReply{{Type: nbdtest.RepErrTooBig}}},
		"go with much data":      {nbdtest.OptGo, make([]byte, 32<<10+1), []nbdtest.OptionReply{{Type: nbdtest.RepErrTooBig}}},
		"peek export":            {4, []byte("disk"), unsupported},
		"start TLS":              {nbdtest.OptStartTLS, nil, unsupported},
		"structured, with data":  {nbdtest.OptStructuredReply, []byte{0}, invalid},
		"extended, with data":    {nbdtest.OptExtendedHeaders, make([]byte, 1<<20), invalid},
		"list contexts too soon": {nbdtest.OptListMetaContext, nbdtest.ContextQuery("disk"), invalid},
		"set contexts too soon":  {nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", "base:allocation"), invalid},
		"option 0":               {0, nil, unsupported},
		"unknown with much data": {1<<32 - 1, make([]byte, 1<<20), unsupported},
	} {
		t.Run(name, func(t *testing.T) {
			client := greeted(t)
			got := client.Ask(test.option, test.data)
			if len(got) != len(test.want) {
				t.Fatalf("%d replies, want %d: %+v", len(got), len(test.want), got)
			}
			for i, reply := range got {
				isError := reply.Type >= 1<<31
				if reply.Type != test.want[i].Type || !isError && !bytes.Equal(reply.Data, test.want[i].Data) {
					t.Errorf("reply %d is %#x %q, want %#x %q", i, reply.Type, reply.Data, test.want[i].Type, test.want[i].Data)
				}
				if isError && len(reply.Data) == 0 {
					t.Error("error without a text")
				}
			}
			// The server has understood where the option ends: the next one works.
			if e, final := client.Info(nbdtest.OptGo, "größer"); final != nbdtest.RepAck || e.Size != 2*mib {
				t.Errorf("go afterwards: %#x, %+v", final, e)
			}
			client.Disconnect()
		})
	}
}

var (
	invalid     = []nbdtest.OptionReply{{Type: nbdtest.RepErrInvalid}}
	unsupported = []nbdtest.OptionReply{{Type: nbdtest.RepErrUnsup}}
)

func TestExportName(t *testing.T) {
	for name, test := range map[string]struct {
		clientFlags uint32
		export      string
		size        uint64
		zeroes      int
	}{
		"default":               {3, "", mib, 0},
		"named":                 {3, "größer", 2 * mib, 0},
		"reserved zeroes":       {1, "disk", mib, 124},
		"not fixed newstyle":    {0, "disk", mib, 124},
		"not fixed, no zeroes":  {2, "disk", mib, 0},
		"unknown":               {3, "nowhere", 0, 0},
		"name of 4097 bytes":    {3, strings.Repeat("x", 4097), 0, 0},
		"name of 16 KiB and 1":  {3, strings.Repeat("x", 16<<10+1), 0, 0},
		"name of nothing known": {1, "\xff\x00", 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", twoExports()))
			client.Greet(test.clientFlags)
			client.SendOption(nbdtest.OptExportName, test.export)
			if test.size == 0 {
				client.ReceiveEnd() // this option knows no other way to say no
				return
			}
			want := nbdtest.Message(test.size)
			if got := client.Receive(10); !bytes.Equal(got[:8], want) {
				t.Errorf("size % x, want % x", got[:8], want)
			}
			if got := client.Receive(test.zeroes); !bytes.Equal(got, make([]byte, test.zeroes)) {
				t.Errorf("reserved bytes % x", got)
			}
			if got, err := client.ReadBytes(512, 512); err != nil || !bytes.Equal(got, make([]byte, 512)) {
				t.Errorf("read: %v", err)
			}
			client.Disconnect()
		})
	}
}

func TestAbort(t *testing.T) {
	for name, data := range map[string][]byte{"": nil, "data": []byte("bye"), "much data": make([]byte, 1<<20)} {
		t.Run(name, func(t *testing.T) {
			client := greeted(t)
			replies := client.Ask(nbdtest.OptAbort, data)
			if len(replies) != 1 || replies[0].Type != nbdtest.RepAck || len(replies[0].Data) != 0 {
				t.Errorf("replies %+v", replies)
			}
			client.ReceiveEnd()
		})
	}
}

// TestHandshakeViolations has what no server needs to answer.
func TestHandshakeViolations(t *testing.T) {
	for name, test := range map[string]struct {
		clientFlags uint32
		send        []byte
	}{
		"unknown client flag":   {1 << 2, nil},
		"wrong option magic":    {3, nbdtest.Message(uint64(nbdtest.OptionMagic+1), uint32(nbdtest.OptList), uint32(0))},
		"over 1 MiB of data":    {3, nbdtest.Message(uint64(nbdtest.OptionMagic), uint32(nbdtest.OptGo), uint32(1<<20+1))},
		"4 GiB of data":         {3, nbdtest.Message(uint64(nbdtest.OptionMagic), uint32(99), uint32(1<<32-1))},
		"a web browser":         {0x47455420, []byte("/ HTTP/1.1\r\n\r\n")},
		"options without end":   {3, bytes.Repeat(nbdtest.Message(uint64(nbdtest.OptionMagic), uint32(99), uint32(0)), 64)},
		"requests, not options": {3, nbdtest.Request{Command: nbdtest.CmdRead, Length: 512}.Encode()},
	} {
		t.Run(name, func(t *testing.T) {
			client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", twoExports()))
			client.Greet(test.clientFlags)
			if _, err := client.Write(test.send); err != nil {
				return // gone already
			}
			// Some answers may come before the end.
			for b := make([]byte, 4096); ; {
				if _, err := client.Read(b); err != nil {
					return
				}
			}
		})
	}
}

func TestNewServerRefuses(t *testing.T) {
	good := newMemory(mib)
	backend := func(i nbdexport.Info) nbdexport.Export { return nbdexport.Export{Backend: describedAs{good, i}} }
	for name, exports := range map[string][]nbdexport.Export{
		"no exports":                nil,
		"two of one name":           {{Name: "a", Backend: good}, {Name: "b", Backend: good}, {Name: "a", Backend: good}},
		"a long name":               {{Name: strings.Repeat("x", 4097), Backend: good}},
		"a name that is not UTF-8":  {{Name: "\xff", Backend: good}},
		"a name with NUL":           {{Name: "a\x00b", Backend: good}},
		"a long description":        {{Description: strings.Repeat("x", 4097), Backend: good}},
		"a negative size":           {backend(nbdexport.Info{Size: -1})},
		"an odd minimum":            {backend(nbdexport.Info{MinimumBlock: 513})},
		"a large minimum":           {backend(nbdexport.Info{MinimumBlock: 128 << 10})},
		"an odd preference":         {backend(nbdexport.Info{PreferredBlock: 4097})},
		"a small preference":        {backend(nbdexport.Info{PreferredBlock: 256})},
		"a large preference":        {backend(nbdexport.Info{PreferredBlock: 64 << 20})},
		"preference below minimum":  {backend(nbdexport.Info{MinimumBlock: 4096, PreferredBlock: 512})},
		"a size of part of a block": {backend(nbdexport.Info{MinimumBlock: 512, Size: 1000})},
	} {
		if _, err := nbdexport.NewServer(nbdexport.Config{Exports: exports}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, config := range []nbdexport.Config{{MaxConnections: -1}, {HandshakeTimeout: -1}} {
		config.Exports = []nbdexport.Export{{Backend: good}}
		if _, err := nbdexport.NewServer(config); err == nil {
			t.Errorf("%+v: no error", config)
		}
	}
	// The extremes that are allowed.
	for _, info := range []nbdexport.Info{
		{},
		{Size: 1<<63 - 1},
		{Size: 64 << 10, MinimumBlock: 64 << 10},
		{PreferredBlock: 32 << 20, MinimumBlock: 1},
	} {
		newServer(t, nbdexport.Config{Exports: []nbdexport.Export{backend(info)}})
	}
}

// describedAs is a backend that describes itself differently.
type describedAs struct {
	nbdexport.Backend
	info nbdexport.Info
}

func (d describedAs) Info() nbdexport.Info { return d.info }

// TestTransmissionFlags looks at what is told to clients for every combination of what a backend can do.
func TestTransmissionFlags(t *testing.T) {
	for _, test := range []struct {
		readOnly, multiConn bool
		want                uint16
	}{
		// has flags, flush, cache; read-only or FUA, trim, write zeroes; multi-conn
		{false, false, 1 | 4 | 1024 | 8 | 32 | 64},
		{false, true, 1 | 4 | 1024 | 8 | 32 | 64 | 256},
		{true, false, 1 | 4 | 1024 | 2},
		{true, true, 1 | 4 | 1024 | 2 | 256},
	} {
		info := nbdexport.Info{Size: mib, ReadOnly: test.readOnly, MultiConn: test.multiConn}
		if got := nbdexport.TransmissionFlags(info); got != test.want {
			t.Errorf("TransmissionFlags(%+v) = %#x, want %#x", info, got, test.want)
		}
		config := nbdexport.Config{Exports: []nbdexport.Export{{Backend: nbdtest.NewMemory(info)}}}
		if e := nbdtest.Dial(t, nbdtest.Serve(t, "unix", config)).Go(""); e.Flags != test.want {
			t.Errorf("negotiated flags of %+v: %#x, want %#x", info, e.Flags, test.want)
		}
	}
}
