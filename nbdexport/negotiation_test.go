package nbdexport_test

import (
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// contextual are two exports with metadata contexts: the first, "disk", has three, the second, "other", one.
func contextual() nbdexport.Config {
	return nbdexport.Config{Exports: []nbdexport.Export{
		{Name: "disk", Backend: nbdtest.NewMemory(nbdexport.Info{Size: mib, Contexts: []string{alloc, depth, dirty}})},
		{Name: "other", Backend: nbdtest.NewMemory(nbdexport.Info{Size: mib, Contexts: []string{alloc}})},
	}}
}

func TestMetadataContexts(t *testing.T) {
	const ack, bad, unknown = nbdtest.RepAck, nbdtest.RepErrInvalid, nbdtest.RepErrUnknown
	client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", contextual()))
	client.Greet(3)
	client.Agree(nbdtest.Structured)
	for name, test := range map[string]struct {
		export    string
		queries   []string
		list, set []string
		final     uint32
	}{
		"everything":              {"disk", nil, []string{alloc, depth, dirty}, nil, ack},
		"by name":                 {"disk", []string{dirty}, []string{dirty}, []string{dirty}, ack},
		"in another order":        {"disk", []string{dirty, alloc}, []string{alloc, dirty}, []string{alloc, dirty}, ack},
		"twice":                   {"disk", []string{alloc, alloc}, []string{alloc}, []string{alloc}, ack},
		"the default export":      {"", []string{depth}, []string{depth}, []string{depth}, ack},
		"namespace":               {"disk", []string{"qemu:"}, []string{depth, dirty}, nil, ack},
		"base":                    {"disk", []string{"base:"}, []string{alloc}, nil, ack},
		"bitmaps":                 {"disk", []string{"qemu:dirty-bitmap:"}, []string{dirty}, nil, ack},
		"part of a name":          {"disk", []string{"base:alloc"}, nil, nil, ack},
		"more than a name":        {"disk", []string{alloc + "x"}, nil, nil, ack},
		"unknown leaf":            {"disk", []string{"base:nothing", alloc}, []string{alloc}, []string{alloc}, ack},
		"unknown namespace":       {"disk", []string{"x-other:thing"}, nil, nil, ack},
		"not of this export":      {"other", []string{depth, alloc}, []string{alloc}, []string{alloc}, ack},
		"no namespace":            {"disk", []string{"allocation"}, nil, nil, bad},
		"nothing":                 {"disk", []string{""}, nil, nil, bad},
		"a query that is no text": {"disk", []string{"base:\xff"}, nil, nil, bad},
		"a query of 4096":         {"disk", []string{"base:" + strings.Repeat("x", 4091)}, nil, nil, ack},
		"a query of 4097":         {"disk", []string{"base:" + strings.Repeat("x", 4092)}, nil, nil, bad},
		"a thousand queries":      {"disk", slices.Repeat([]string{alloc}, 1000), []string{alloc}, []string{alloc}, ack},
		"too many queries":        {"disk", slices.Repeat([]string{alloc}, 3000), nil, nil, nbdtest.RepErrTooBig},
		"unknown export":          {"nowhere", []string{alloc}, nil, nil, unknown},
	} {
		for kind, ask := range map[string]func(string, ...string) (map[string]uint32, uint32){
			"list": client.ListContexts, "set": client.SetContexts,
		} {
			want := map[string][]string{"list": test.list, "set": test.set}[kind]
			found, final := ask(test.export, test.queries...)
			if got := slices.Sorted(maps.Keys(found)); final != test.final || !slices.Equal(got, want) {
				t.Errorf("%s, %s: %q and %#x, want %q and %#x", name, kind, got, final, want, test.final)
			}
		}
		// The server allows 64 options: each case has its own handshake.
		client.SendOption(nbdtest.OptAbort)
		client = nbdtest.Dial(t, client.RemoteAddr())
		client.Greet(3)
		client.Agree(nbdtest.Structured)
	}
	for name, data := range map[string][]byte{
		"no data":              nil,
		"no count":             nbdtest.Message(uint32(4), "disk"),
		"a count too high":     nbdtest.Message(uint32(4), "disk", uint32(1)),
		"a huge count":         nbdtest.Message(uint32(4), "disk", uint32(1<<32-1)),
		"a count that wraps":   nbdtest.Message(uint32(4), "disk", uint32(1<<30), uint32(0)),
		"a huge name":          nbdtest.Message(uint32(1<<32-1), "disk", uint32(0)),
		"a huge query":         nbdtest.Message(uint32(4), "disk", uint32(1), uint32(1<<32-1), "base:"),
		"a query beyond":       nbdtest.Message(uint32(4), "disk", uint32(1), uint32(6), "base:"),
		"bytes behind queries": append(nbdtest.ContextQuery("disk", alloc), 0),
	} {
		for _, option := range []uint32{nbdtest.OptListMetaContext, nbdtest.OptSetMetaContext} {
			if replies := client.Ask(option, data); len(replies) != 1 || replies[0].Type != bad || len(replies[0].Data) == 0 {
				t.Errorf("%s, option %d: %+v", name, option, replies)
			}
		}
	}
}

// TestContextsAreDropped looks at what becomes of the contexts that were selected.
func TestContextsAreDropped(t *testing.T) {
	const none, inval = syscall.Errno(0), syscall.EINVAL
	for name, test := range map[string]struct {
		then func(*nbdtest.Client)
		want syscall.Errno
	}{
		"nothing else":         {func(c *nbdtest.Client) { c.Choose("disk") }, none},
		"the default's name":   {func(c *nbdtest.Client) { c.Choose("") }, none},
		"another export":       {func(c *nbdtest.Client) { c.Choose("other") }, inval},
		"set for another":      {func(c *nbdtest.Client) { c.SetContexts("other", alloc); c.Choose("disk") }, inval},
		"set again":            {func(c *nbdtest.Client) { c.SetContexts("disk", dirty); c.Choose("disk") }, none},
		"set to nothing":       {func(c *nbdtest.Client) { c.SetContexts("disk"); c.Choose("disk") }, inval},
		"set to a wildcard":    {func(c *nbdtest.Client) { c.SetContexts("disk", "base:"); c.Choose("disk") }, inval},
		"unknown export":       {func(c *nbdtest.Client) { c.SetContexts("nowhere", alloc); c.Choose("disk") }, inval},
		"set fails":            {func(c *nbdtest.Client) { c.Ask(nbdtest.OptSetMetaContext, "\xff"); c.Choose("disk") }, inval},
		"set is too long":      {func(c *nbdtest.Client) { c.Ask(nbdtest.OptSetMetaContext, make([]byte, 1<<20)); c.Choose("disk") }, inval},
		"list fails":           {func(c *nbdtest.Client) { c.Ask(nbdtest.OptListMetaContext, "\xff"); c.Choose("disk") }, none},
		"list for another":     {func(c *nbdtest.Client) { c.ListContexts("other"); c.Choose("disk") }, none},
		"info of another":      {func(c *nbdtest.Client) { c.Info(nbdtest.OptInfo, "other"); c.Choose("disk") }, none},
		"go fails in between":  {func(c *nbdtest.Client) { c.Info(nbdtest.OptGo, "nowhere"); c.Choose("disk") }, none},
		"extended afterwards":  {func(c *nbdtest.Client) { c.Agree(nbdtest.Extended); c.Choose("disk") }, none},
		"structured once more": {func(c *nbdtest.Client) { c.Agree(nbdtest.Structured); c.Choose("disk") }, none},
		"the old way of choosing": {func(c *nbdtest.Client) {
			c.SendOption(nbdtest.OptExportName, "disk")
			c.Receive(10)
		}, none},
	} {
		t.Run(name, func(t *testing.T) {
			client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", contextual()))
			client.Greet(3)
			client.Agree(nbdtest.Structured)
			client.SetContexts("disk", alloc, depth)
			test.then(client)
			reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Length: 4096})
			if reply.Errno() != test.want {
				t.Errorf("block status: %v, want %v", reply.Err, test.want)
			}
			client.Disconnect()
		})
	}
}

// TestNegotiationOrder has the rules about what may come after what.
func TestNegotiationOrder(t *testing.T) {
	start := func(t *testing.T) *nbdtest.Client {
		client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", contextual()))
		client.Greet(3)
		return client
	}
	t.Run("structured after extended", func(t *testing.T) {
		client := start(t)
		client.Agree(nbdtest.Extended)
		if replies := client.Ask(nbdtest.OptStructuredReply); replies[0].Type != nbdtest.RepErrExtHeaderRequired {
			t.Errorf("%+v", replies)
		}
		client.Choose("disk") // extended headers still are what was agreed on
		if _, err := client.ReadBytes(0, 512); err != nil {
			t.Error(err)
		}
		client.Disconnect()
	})
	t.Run("extended after structured", func(t *testing.T) {
		client := start(t)
		client.Agree(nbdtest.Structured)
		client.Agree(nbdtest.Extended)
		client.Choose("disk")
		if _, err := client.ReadBytes(0, 512); err != nil {
			t.Error(err)
		}
	})
	t.Run("export name after extended", func(t *testing.T) {
		client := start(t)
		client.Agree(nbdtest.Extended)
		client.SendOption(nbdtest.OptExportName, "disk")
		client.ReceiveEnd()
	})
	t.Run("export name after structured", func(t *testing.T) {
		client := start(t)
		client.Agree(nbdtest.Structured)
		client.SendOption(nbdtest.OptExportName, "disk")
		if flags := client.Receive(10)[8:]; flags[1]&byte(nbdexport.FlagSendDF) == 0 {
			t.Errorf("flags % x", flags)
		}
		if _, err := client.ReadBytes(0, 512); err != nil {
			t.Error(err)
		}
	})
	t.Run("refused extended headers change nothing", func(t *testing.T) {
		client := start(t)
		if replies := client.Ask(nbdtest.OptExtendedHeaders, "data"); replies[0].Type != nbdtest.RepErrInvalid {
			t.Errorf("%+v", replies)
		}
		if replies := client.Ask(nbdtest.OptStructuredReply, "data"); replies[0].Type != nbdtest.RepErrInvalid {
			t.Errorf("%+v", replies)
		}
		client.Choose("disk")
		if _, err := client.ReadBytes(0, 512); err != nil {
			t.Error(err)
		}
	})
	t.Run("flags", func(t *testing.T) {
		for style, want := range map[nbdtest.Style]uint16{nbdtest.Simple: 0, nbdtest.Structured: nbdexport.FlagSendDF, nbdtest.Extended: nbdexport.FlagSendDF} {
			client := start(t)
			client.Agree(style)
			if e := client.Choose("disk"); e.Flags&(nbdexport.FlagSendDF|nbdexport.FlagBlockStatusPayload) != want {
				t.Errorf("%v: flags %#x", style, e.Flags)
			}
		}
	})
}

// TestHandshakeLeavesBackendAlone negotiates everything there is: nothing of it reaches a backend, and without the TLS that
// is asked of it a client does not even learn what a backend says of itself.
func TestHandshakeLeavesBackendAlone(t *testing.T) {
	b := &shy{hollow: hollow{info: nbdexport.Info{Size: mib, Contexts: []string{alloc}}}}
	everything := func(client *nbdtest.Client) {
		client.Ask(nbdtest.OptList)
		client.Ask(nbdtest.OptStructuredReply)
		client.Ask(nbdtest.OptExtendedHeaders)
		client.Ask(nbdtest.OptListMetaContext, nbdtest.ContextQuery(""))
		client.Ask(nbdtest.OptSetMetaContext, nbdtest.ContextQuery("", alloc))
		client.Ask(nbdtest.OptInfo, nbdtest.InfoRequest("", nbdtest.InfoBlockSize))
	}
	client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", offer(b)))
	client.Greet(3)
	everything(client)
	client.Style = nbdtest.Extended
	client.Choose("")
	client.Disconnect()
	if ops := b.take(); ops != nil {
		t.Errorf("the backend saw %+v", ops)
	}
	config := secured(nbdtest.NewAuthority(t), false)
	config.Exports = offer(b).Exports
	secret := nbdtest.Dial(t, nbdtest.Serve(t, "unix", config))
	b.asked.Store(0)
	secret.Greet(3)
	everything(secret)
	secret.Ask(nbdtest.OptGo, nbdtest.InfoRequest(""))
	if n := b.asked.Load(); n != 0 || b.take() != nil {
		t.Errorf("without TLS the backend was asked %d times", n)
	}
}

// shy is a backend that counts how often it is asked about itself.
type shy struct {
	hollow
	asked atomic.Int32
}

func (s *shy) Info() nbdexport.Info {
	s.asked.Add(1)
	return s.hollow.Info()
}
