package nbd

import (
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// Names and numbers of the netlink family, from include/uapi/linux/nbd-netlink.h.
const (
	familyName    = "nbd"
	familyVersion = 1

	commandConnect     = 1
	commandDisconnect  = 2
	commandReconfigure = 3

	attrIndex           = 1  // u32
	attrSize            = 2  // u64, bytes
	attrBlockSize       = 3  // u64, bytes
	attrTimeout         = 4  // u64, seconds
	attrServerFlags     = 5  // u64, transmission flags
	attrSockets         = 7  // nested
	attrDeadConnTimeout = 8  // u64, seconds
	attrBackend         = 10 // string

	socketItem = 1 // nested, in attrSockets
	socketFD   = 1 // u32, in socketItem
)

// client speaks the netlink family. Requests are carried out by the kernel while they are being sent, so there is nothing
// that a context could interrupt without losing track of what was done.
type client struct {
	dial func() (*genetlink.Conn, error)
}

func newClient() client {
	return client{func() (*genetlink.Conn, error) { return genetlink.Dial(nil) }}
}

// export is what the kernel is told when a device is set up.
type export struct {
	backend         string // identifier
	size            int64  // bytes
	blockSize       int    // bytes
	flags           uint16 // transmission flags
	requestTimeout  time.Duration
	deadConnTimeout time.Duration
	socket          int // file descriptor; the kernel takes a reference of its own
}

// available returns an error that matches fs.ErrNotExist where the kernel, as this network namespace sees it, has no
// such family.
func (c client) available() error {
	return c.do(func(*genetlink.Conn, genetlink.Family) error { return nil })
}

// connect sets up a device and returns its number.
func (c client) connect(e export) (index uint32, err error) {
	attributes := netlink.NewAttributeEncoder()
	attributes.Uint64(attrSize, uint64(e.size))
	attributes.Uint64(attrBlockSize, uint64(e.blockSize))
	attributes.Uint64(attrTimeout, seconds(e.requestTimeout))
	attributes.Uint64(attrServerFlags, uint64(e.flags))
	attributes.Uint64(attrDeadConnTimeout, seconds(e.deadConnTimeout))
	attributes.String(attrBackend, e.backend)
	attributes.Nested(attrSockets, sockets(e.socket))
	// The kernel answers with the number, and says nothing more when it is not asked to acknowledge.
	replies, err := c.execute(commandConnect, attributes, 0)
	if err != nil {
		return 0, err
	}
	for _, reply := range replies {
		d, err := netlink.NewAttributeDecoder(reply.Data)
		if err != nil {
			return 0, err
		}
		for d.Next() {
			if d.Type() == attrIndex {
				return d.Uint32(), d.Err()
			}
		}
	}
	return 0, errors.New("nbd: the kernel does not say which device it has set up")
}

// reconnect hands the kernel a new socket in place of a dead one. While the kernel has not noticed that the old one
// is dead it refuses, or ignores the new one, of which it then closes its end.
func (c client) reconnect(index uint32, backend string, socket int) error {
	attributes := netlink.NewAttributeEncoder()
	attributes.Uint32(attrIndex, index)
	attributes.String(attrBackend, backend)
	attributes.Nested(attrSockets, sockets(socket))
	_, err := c.execute(commandReconfigure, attributes, netlink.Acknowledge)
	return err
}

// resize changes the size of a device whose connection is alive. Not together with a socket: kernels get stuck on that.
func (c client) resize(index uint32, backend string, size int64) error {
	attributes := netlink.NewAttributeEncoder()
	attributes.Uint32(attrIndex, index)
	attributes.Uint64(attrSize, uint64(size))
	attributes.String(attrBackend, backend)
	_, err := c.execute(commandReconfigure, attributes, netlink.Acknowledge)
	return err
}

// disconnect ends the connection, failing what waits for it. A device that is not connected is fine.
func (c client) disconnect(index uint32) error {
	attributes := netlink.NewAttributeEncoder()
	attributes.Uint32(attrIndex, index)
	_, err := c.execute(commandDisconnect, attributes, netlink.Acknowledge)
	return err
}

func sockets(fd int) func(*netlink.AttributeEncoder) error {
	return func(list *netlink.AttributeEncoder) error {
		list.Nested(socketItem, func(item *netlink.AttributeEncoder) error {
			item.Uint32(socketFD, uint32(fd))
			return nil
		})
		return nil
	}
}

func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// execute sends a command and returns the answers.
func (c client) execute(
	command uint8, attributes *netlink.AttributeEncoder, flags netlink.HeaderFlags,
) (replies []genetlink.Message, err error) {
	data, err := attributes.Encode()
	if err != nil {
		return nil, err
	}
	err = c.do(func(conn *genetlink.Conn, family genetlink.Family) error {
		message := genetlink.Message{Header: genetlink.Header{Command: command, Version: familyVersion}, Data: data}
		replies, err = conn.Execute(message, family.ID, netlink.Request|flags)
		return err
	})
	return replies, err
}

func (c client) do(f func(*genetlink.Conn, genetlink.Family) error) error {
	conn, err := c.dial()
	if err != nil {
		return fmt.Errorf("open a netlink socket: %w", err)
	}
	defer conn.Close() //nolint:errcheck // says nothing about what the kernel has done
	family, err := conn.GetFamily(familyName)
	if err != nil {
		return fmt.Errorf("netlink family %s: %w", familyName, err)
	}
	return f(conn, family)
}
