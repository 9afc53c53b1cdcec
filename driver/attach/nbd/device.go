package nbd

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// device is a device that this process serves.
type device struct {
	index    uint32
	tag      string
	backend  nbdexport.Backend
	geometry attach.Geometry // Size is guarded by the claim on the volume

	kernel   client
	lifetime time.Duration // how long the kernel waits for a new connection

	ctx    context.Context // done when serving is to end
	cancel context.CancelFunc
	ended  chan struct{} // closed when the backend is no longer used
}

// newDevice returns a device whose serve is still to be called.
func newDevice(ctx context.Context, a *Attacher, index uint32, tag string, b nbdexport.Backend, g attach.Geometry) *device {
	d := &device{
		index:    index,
		tag:      tag,
		backend:  b,
		geometry: g,
		kernel:   a.kernel,
		lifetime: a.options.DeadConnTimeout,
		ended:    make(chan struct{}),
	}
	// The device outlives the call that attaches it, but keeps its logger.
	logger := klog.FromContext(ctx).WithValues("device", d.path(), "backend", tag)
	d.ctx, d.cancel = context.WithCancel(klog.NewContext(context.Background(), logger))
	return d
}

func (d *device) name() string { return deviceName(d.index) }
func (d *device) path() string { return devicePath(d.index) }

// alive tells whether the device is being served.
func (d *device) alive() bool {
	select {
	case <-d.ended:
		return false
	default:
		return true
	}
}

// stop ends the connection, after the requests that the kernel has sent were answered, and waits for that.
func (d *device) stop() {
	d.cancel()
	<-d.ended
}

// serve serves the device by conn, and by new connections when that one is lost, until the kernel takes its leave or stop
// is called.
func (d *device) serve(conn net.Conn) {
	defer close(d.ended)
	logger := klog.FromContext(d.ctx)
	for {
		err := nbdexport.ServeTransmission(d.ctx, conn, d.backend)
		if err == nil || d.ctx.Err() != nil {
			return
		}
		// Every request of the lost connection has ended, so none can overtake its own repetition.
		logger.Error(err, "The connection to the kernel was lost, reconnecting")
		conn, err = d.reconnect()
		switch {
		case err == nil:
			logger.Info("Reconnected")
			continue
		case d.ctx.Err() != nil:
			return
		}
		logger.Error(err, "Cannot reconnect; disconnecting the device: its I/O fails from now on")
		if err := d.kernel.disconnect(d.index); err != nil {
			logger.Error(err, "Cannot disconnect the device either")
		}
		return
	}
}

// reconnect hands the kernel the other end of a new connection. It takes a moment until the kernel sees that the old
// one is dead; before that it refuses new ones, or seems to take them and drops them.
func (d *device) reconnect() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(d.ctx, d.lifetime)
	defer cancel()
	var (
		conn    net.Conn
		refusal error
	)
	err := blockdev.Await(ctx, "the kernel to take a new connection", func() (bool, error) {
		ours, theirs, err := socketPair()
		if err != nil {
			return false, err
		}
		refusal = d.kernel.reconnect(d.index, d.tag, int(theirs.Fd()))
		if err := theirs.Close(); err != nil {
			return false, errors.Join(err, ours.Close())
		}
		taken := refusal == nil
		if taken {
			taken, err = connected(ours)
		}
		if !taken {
			return false, errors.Join(err, ours.Close())
		}
		conn = ours
		return true, nil
	})
	if err != nil {
		return nil, errors.Join(err, refusal)
	}
	return conn, nil
}

// connected tells whether somebody has the other end of a connection.
func connected(conn *net.UnixConn) (bool, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	var hungUp int16
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, pollErr = unix.Poll(polled, 0)
		hungUp = polled[0].Revents & (unix.POLLRDHUP | unix.POLLHUP)
	})
	return hungUp == 0, errors.Join(err, pollErr)
}

// socketPair returns a connection and its other end, which is for the kernel.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	end := os.NewFile(uintptr(fds[0]), "nbd server")
	theirs = os.NewFile(uintptr(fds[1]), "nbd client")
	conn, err := net.FileConn(end)
	if err := errors.Join(err, end.Close()); err != nil { // FileConn works on a duplicate
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}
