package nbdexport_test

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// secured is contextual with TLS.
func secured(a *nbdtest.Authority, optional bool) nbdexport.Config {
	config := contextual()
	config.TLS, config.TLSOptional = &tls.Config{Certificates: []tls.Certificate{a.Server}}, optional
	return config
}

// serveSecured serves what config says and returns a client that has been greeted.
func serveSecured(t *testing.T, network string, config nbdexport.Config) *nbdtest.Client {
	t.Helper()
	client := nbdtest.Dial(t, nbdtest.Serve(t, network, config))
	client.Greet(3)
	return client
}

func TestTLS(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	for _, network := range []string{"unix", "tcp"} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(network+"/"+tls.VersionName(version), func(t *testing.T) {
				forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
					client := serveSecured(t, network, secured(authority, false))
					if err := client.StartTLS(authority.Client(version)); err != nil {
						t.Fatal(err)
					}
					client.Agree(style)
					if style != nbdtest.Simple {
						client.SetContexts("disk", alloc)
					}
					client.Choose("disk")
					for _, n := range []int{512, 64 << 10, 512 << 10} {
						p := slices.Repeat([]byte{byte(n >> 8), 1}, n/2)
						if err := client.WriteBytes(4096, p); err != nil {
							t.Error(err)
						}
						if got, err := client.ReadBytes(4096, n); err != nil || !slices.Equal(got, p) {
							t.Errorf("read of %d bytes: %v, or other data", n, err)
						}
					}
					if style != nbdtest.Simple {
						reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Length: mib})
						if reply.Err != nil {
							t.Error(reply.Err)
						}
					}
					client.Disconnect()
				})
			})
		}
	}
}

// TestTLSMandatory has a client that wants something without TLS. It learns nothing.
func TestTLSMandatory(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	config := secured(authority, false)
	for name, option := range map[string]struct {
		number uint32
		data   []byte
	}{
		"list":          {nbdtest.OptList, nil},
		"list, data":    {nbdtest.OptList, make([]byte, 1<<20)},
		"info":          {nbdtest.OptInfo, nbdtest.InfoRequest("disk")},
		"info, unknown": {nbdtest.OptInfo, nbdtest.InfoRequest("nowhere")},
		"info, wrong":   {nbdtest.OptInfo, nil},
		"go":            {nbdtest.OptGo, nbdtest.InfoRequest("disk")},
		"go, much data": {nbdtest.OptGo, make([]byte, 1<<20)},
		"structured":    {nbdtest.OptStructuredReply, nil},
		"extended":      {nbdtest.OptExtendedHeaders, nil},
		"list contexts": {nbdtest.OptListMetaContext, nbdtest.ContextQuery("disk")},
		"set contexts":  {nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", alloc)},
		"unknown":       {99, nil},
	} {
		t.Run(name, func(t *testing.T) {
			client := serveSecured(t, "unix", config)
			replies := client.Ask(option.number, option.data)
			if len(replies) != 1 || replies[0].Type != nbdtest.RepErrTLSRequired {
				t.Errorf("%+v", replies)
			}
			if err := client.StartTLS(authority.Client(0)); err != nil {
				t.Error(err)
			}
			client.Choose("disk")
			client.Disconnect()
		})
	}
	t.Run("export name", func(t *testing.T) {
		client := serveSecured(t, "unix", config)
		client.SendOption(nbdtest.OptExportName, "disk")
		client.ReceiveEnd()
	})
	t.Run("abort", func(t *testing.T) {
		client := serveSecured(t, "unix", config)
		if replies := client.Ask(nbdtest.OptAbort); replies[0].Type != nbdtest.RepAck {
			t.Errorf("%+v", replies)
		}
		client.ReceiveEnd()
	})
	t.Run("not fixed newstyle", func(t *testing.T) {
		client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", config))
		client.Greet(0)
		client.ReceiveEnd()
	})
	t.Run("TLS with data", func(t *testing.T) {
		for _, data := range [][]byte{{0}, make([]byte, 1<<20)} {
			client := serveSecured(t, "unix", config)
			if replies := client.Ask(nbdtest.OptStartTLS, data); replies[0].Type != nbdtest.RepErrInvalid {
				t.Errorf("%+v", replies)
			}
			if replies := client.Ask(nbdtest.OptGo, nbdtest.InfoRequest("disk")); replies[0].Type != nbdtest.RepErrTLSRequired {
				t.Errorf("%+v", replies)
			}
		}
	})
}

func TestTLSOptional(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			client := serveSecured(t, "unix", secured(authority, true))
			if secure {
				if err := client.StartTLS(authority.Client(0)); err != nil {
					t.Fatal(err)
				}
			}
			client.Choose("other")
			client.Disconnect()
		})
	}
	// Without fixed newstyle negotiation a server must behave as if it knew nothing of TLS.
	t.Run("not fixed newstyle", func(t *testing.T) {
		client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", secured(authority, true)))
		client.Greet(2)
		if replies := client.Ask(nbdtest.OptStartTLS); replies[0].Type != nbdtest.RepErrUnsup {
			t.Errorf("%+v", replies)
		}
	})
}

// TestTLSTwice initiates TLS inside of TLS.
func TestTLSTwice(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	for _, optional := range []bool{false, true} {
		client := serveSecured(t, "unix", secured(authority, optional))
		if err := client.StartTLS(authority.Client(0)); err != nil {
			t.Fatal(err)
		}
		for _, data := range [][]byte{nil, {0}} {
			if replies := client.Ask(nbdtest.OptStartTLS, data); len(replies) != 1 || replies[0].Type != nbdtest.RepErrInvalid {
				t.Errorf("%+v", replies)
			}
		}
		client.Choose("disk")
		client.Disconnect()
	}
}

// TestTLSForgets agrees on everything there is before TLS, and finds nothing of it afterwards.
func TestTLSForgets(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	for _, style := range []nbdtest.Style{nbdtest.Structured, nbdtest.Extended} {
		client := serveSecured(t, "unix", secured(authority, true))
		client.Agree(style)
		client.SetContexts("disk", alloc)
		if err := client.StartTLS(authority.Client(0)); err != nil {
			t.Fatal(err)
		}
		if e, _ := client.Info(nbdtest.OptInfo, "disk"); e.Flags&(nbdexport.FlagSendDF|nbdexport.FlagBlockStatusPayload) != 0 {
			t.Errorf("flags %#x", e.Flags)
		}
		if replies := client.Ask(nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", alloc)); replies[0].Type != nbdtest.RepErrInvalid {
			t.Errorf("%+v", replies)
		}
		client.Agree(style) // and so structured replies are possible again, and the contexts are not there yet
		client.Choose("disk")
		if reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Length: 512}); !errors.Is(reply.Err, syscall.EINVAL) {
			t.Errorf("block status: %v", reply.Err)
		}
		client.Disconnect()
	}
}

// TestTLSRefusesInjection has somebody between client and server who sends options of his own behind STARTTLS, in the
// hope that they count as the client's.
func TestTLSRefusesInjection(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	option := func(number uint32, data []byte) []byte {
		return nbdtest.Message(uint64(nbdtest.OptionMagic), number, uint32(len(data)), data)
	}
	for name, injected := range map[string][]byte{
		"go":               option(nbdtest.OptGo, nbdtest.InfoRequest("disk")),
		"structured reply": option(nbdtest.OptStructuredReply, nil),
		"a byte":           {0},
	} {
		for _, optional := range []bool{false, true} {
			client := serveSecured(t, "unix", secured(authority, optional))
			client.Send(option(nbdtest.OptStartTLS, nil), injected)
			for b := make([]byte, 4096); ; {
				n, err := client.Read(b)
				if err != nil {
					break
				}
				if slices.Contains(b[:n], nbdtest.RepInfo) {
					t.Errorf("%s: the server answered % x", name, b[:n])
				}
			}
		}
	}
}

// TestTLSFails has handshakes that must not succeed: nothing comes after them, and the server goes on.
func TestTLSFails(t *testing.T) {
	authority, other := nbdtest.NewAuthority(t), nbdtest.NewAuthority(t)
	config := secured(authority, false)
	config.TLS.ClientAuth, config.TLS.ClientCAs = tls.RequireAndVerifyClientCert, authority.Pool
	addr := nbdtest.Serve(t, "tcp", config)
	with := func(certificates ...tls.Certificate) *tls.Config {
		c := authority.Client(0)
		c.Certificates = certificates
		return c
	}
	old := with(authority.User)
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	for name, c := range map[string]*tls.Config{
		"no certificate":      with(),
		"somebody else's":     with(other.User),
		"a server's":          with(authority.Server),
		"an old version":      old,
		"an untrusted server": {RootCAs: other.Pool, ServerName: "localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			client := nbdtest.Dial(t, addr)
			client.Greet(3)
			err := client.StartTLS(c)
			if err == nil { // with TLS 1.3 a client learns of its refusal when it reads
				client.SendOption(nbdtest.OptGo, nbdtest.InfoRequest("disk"))
				client.ReceiveEnd()
			}
		})
	}
	t.Run("right", func(t *testing.T) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			client := nbdtest.Dial(t, addr)
			client.Greet(3)
			c := with(authority.User)
			c.MinVersion, c.MaxVersion = version, version
			if err := client.StartTLS(c); err != nil {
				t.Fatal(err)
			}
			client.Choose("disk")
			client.Disconnect()
		}
	})
	t.Run("no TLS at all", func(t *testing.T) {
		client := nbdtest.Dial(t, addr)
		client.Greet(3)
		client.Ask(nbdtest.OptStartTLS)
		client.SendOption(nbdtest.OptGo, nbdtest.InfoRequest("disk"))
		for b := make([]byte, 4096); ; { // an alert, and the end
			n, err := client.Read(b)
			if err != nil {
				break
			}
			if b[0] != 21 {
				t.Errorf("the server answered % x", b[:n])
			}
		}
	})
}

// TestSlowTLSEnds has a client that stops in the handshake of TLS.
func TestSlowTLSEnds(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	config := secured(authority, false)
	config.HandshakeTimeout = 200 * time.Millisecond
	ended := make(chan nbdexport.Disconnect, 2)
	config.Disconnected = func(d nbdexport.Disconnect) { ended <- d }
	addr := nbdtest.Serve(t, "tcp", config)
	for name, sent := range map[string][]byte{"silent": nil, "part of a hello": {22, 3, 1, 2, 0, 1}} {
		client := nbdtest.Dial(t, addr)
		client.Greet(3)
		client.Ask(nbdtest.OptStartTLS)
		client.Send(sent)
		begin := time.Now()
		if d := <-ended; !errors.Is(d.Err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %+v", name, d)
		}
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("%s: ended after %v", name, d)
		}
	}
	// What has been negotiated inside of TLS counts, too.
	client := nbdtest.Dial(t, addr)
	client.Greet(3)
	if err := client.StartTLS(authority.Client(0)); err != nil {
		t.Fatal(err)
	}
	if d := <-ended; !errors.Is(d.Err, os.ErrDeadlineExceeded) {
		t.Errorf("silent inside of TLS: %+v", d)
	}
}

func TestNewServerRefusesTLSWithoutCertificate(t *testing.T) {
	config := contextual()
	config.TLS = &tls.Config{}
	if _, err := nbdexport.NewServer(config); err == nil {
		t.Error("no error")
	}
}

// TestTLSIsOver makes sure that what goes over the wire is TLS and nothing else, from the acknowledgement on.
func TestTLSIsOver(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	client := serveSecured(t, "unix", secured(authority, false))
	tap := &tapped{Conn: client.Conn}
	client.Ask(nbdtest.OptStartTLS)
	secure := tls.Client(tap, authority.Client(tls.VersionTLS13))
	inside := nbdtest.NewClient(t, secure)
	inside.Choose("disk")
	inside.Disconnect()
	for b := tap.received; len(b) > 0; {
		if len(b) < 5 || b[0] < 20 || b[0] > 23 || b[1] != 3 || len(b) < 5+int(b[3])<<8+int(b[4]) {
			t.Fatalf("no record of TLS: % x", b[:min(len(b), 32)])
		}
		b = b[5+int(b[3])<<8+int(b[4]):]
	}
}

// tapped is a connection that keeps what it receives.
type tapped struct {
	net.Conn
	received []byte
}

func (c *tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received = append(c.received, p[:n]...)
	return n, err
}
