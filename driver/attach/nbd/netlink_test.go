package nbd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
)

var testFamily = genetlink.Family{ID: 27, Name: familyName, Version: familyVersion}

// fakeKernel returns a client whose requests go to answer, after they were put into words, and the words of the last one.
func fakeKernel(t *testing.T, answer func() ([]genetlink.Message, error)) (c client, last *string) {
	last = new(string)
	handle := func(request genetlink.Message, header netlink.Message) ([]genetlink.Message, error) {
		*last = words(t, request, header)
		return answer()
	}
	return client{func() (*genetlink.Conn, error) {
		return genltest.Dial(genltest.ServeFamily(testFamily, handle)), nil
	}}, last
}

// words puts a request into words, one attribute a line, in the order in which they were sent.
func words(t *testing.T, request genetlink.Message, header netlink.Message) string {
	t.Helper()
	if header.Header.Type != netlink.HeaderType(testFamily.ID) || request.Header.Version != familyVersion {
		t.Errorf("request to family %d, version %d", header.Header.Type, request.Header.Version)
	}
	lines := []string{fmt.Sprintf("command %d, flags %s", request.Header.Command, header.Header.Flags)}
	d, err := netlink.NewAttributeDecoder(request.Data)
	if err != nil {
		t.Fatal(err)
	}
	for d.Next() {
		var value string
		switch length := len(d.Bytes()); d.Type() {
		case attrIndex:
			value = fmt.Sprintf("u%d %d", length*8, d.Uint32())
		case attrSize, attrBlockSize, attrTimeout, attrServerFlags, attrDeadConnTimeout:
			value = fmt.Sprintf("u%d %d", length*8, d.Uint64())
		case attrBackend:
			value = fmt.Sprintf("string %q", d.Bytes())
		case attrSockets:
			d.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					value += fmt.Sprintf("nested %d:", list.Type())
					list.Nested(func(item *netlink.AttributeDecoder) error {
						for item.Next() {
							value += fmt.Sprintf(" %d: u%d %d", item.Type(), len(item.Bytes())*8, item.Uint32())
						}
						return item.Err()
					})
				}
				return list.Err()
			})
		default:
			t.Errorf("unknown attribute %d", d.Type())
		}
		lines = append(lines, fmt.Sprintf("  %d: %s", d.Type(), value))
	}
	if err := d.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

// silence is the answer of a kernel that has nothing to say but that all went well.
func silence() ([]genetlink.Message, error) { return nil, io.EOF }

func refusal(errno syscall.Errno) func() ([]genetlink.Message, error) {
	return func() ([]genetlink.Message, error) { return nil, genltest.Error(int(errno)) }
}

func message(t *testing.T, encode func(*netlink.AttributeEncoder)) func() ([]genetlink.Message, error) {
	t.Helper()
	attributes := netlink.NewAttributeEncoder()
	encode(attributes)
	data, err := attributes.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return func() ([]genetlink.Message, error) {
		return []genetlink.Message{{Header: genetlink.Header{Command: commandConnect, Version: familyVersion}, Data: data}}, nil
	}
}

var testExport = export{
	backend:         "qcow-csi:qcow-csi.io:pool/volume",
	size:            1 << 30,
	blockSize:       512,
	flags:           0x65,
	requestTimeout:  1500 * time.Millisecond,
	deadConnTimeout: time.Minute,
	socket:          7,
}

func TestRequests(t *testing.T) {
	numbered := message(t, func(a *netlink.AttributeEncoder) { a.Uint32(attrIndex, 42) })
	for name, test := range map[string]struct {
		answer func() ([]genetlink.Message, error)
		do     func(client) error
		want   string
	}{
		"connect": {
			numbered,
			func(c client) error {
				index, err := c.connect(testExport)
				if index != 42 {
					t.Errorf("the device is number %d, want 42", index)
				}
				return err
			},
			`command 1, flags request
  2: u64 1073741824
  3: u64 512
  4: u64 2
  5: u64 101
  8: u64 60
  10: string "qcow-csi:qcow-csi.io:pool/volume\x00"
  7: nested 1: 1: u32 7`,
		},
		"reconnect": {
			silence,
			func(c client) error { return c.reconnect(3, "qcow-csi:o:v", 9) },
			`command 3, flags request|acknowledge
  1: u32 3
  10: string "qcow-csi:o:v\x00"
  7: nested 1: 1: u32 9`,
		},
		"resize": {
			silence,
			func(c client) error { return c.resize(3, "qcow-csi:o:v", 2<<30) },
			`command 3, flags request|acknowledge
  1: u32 3
  2: u64 2147483648
  10: string "qcow-csi:o:v\x00"`,
		},
		"disconnect": {
			silence,
			func(c client) error { return c.disconnect(0) },
			`command 2, flags request|acknowledge
  1: u32 0`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, last := fakeKernel(t, test.answer)
			if err := test.do(c); err != nil {
				t.Error(err)
			}
			if *last != test.want {
				t.Errorf("sent\n%s\nwant\n%s", *last, test.want)
			}
		})
		t.Run(name+" refused", func(t *testing.T) {
			c, _ := fakeKernel(t, refusal(syscall.EPERM))
			refused := test.do
			if name == "connect" {
				refused = func(c client) error { _, err := c.connect(testExport); return err }
			}
			if err := refused(c); !errors.Is(err, syscall.EPERM) {
				t.Errorf("%v, want %v", err, syscall.EPERM)
			}
		})
	}
}

func TestConnectAnswers(t *testing.T) {
	for name, answer := range map[string]func() ([]genetlink.Message, error){
		"nothing":            silence,
		"something else":     message(t, func(a *netlink.AttributeEncoder) { a.Uint64(attrSize, 1) }),
		"a number too short": message(t, func(a *netlink.AttributeEncoder) { a.Uint8(attrIndex, 1) }),
	} {
		c, _ := fakeKernel(t, answer)
		if index, err := c.connect(testExport); err == nil {
			t.Errorf("%s: device %d", name, index)
		}
	}
}

func TestAvailable(t *testing.T) {
	c, _ := fakeKernel(t, silence)
	if err := c.available(); err != nil {
		t.Error(err)
	}
	without := client{func() (*genetlink.Conn, error) {
		return genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(syscall.ENOENT))
		}), nil
	}}
	if err := without.available(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want %v", err, fs.ErrNotExist)
	}
	failing := client{func() (*genetlink.Conn, error) { return nil, syscall.EMFILE }}
	if err := failing.available(); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("%v, want %v", err, syscall.EMFILE)
	}
}
