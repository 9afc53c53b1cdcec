package driver

import (
	"context"
	"fmt"
	"path"
	"runtime/debug"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"
)

// calls is around every call: it names it in the log, turns its error into a status, and survives its panic.
type calls struct {
	logger klog.Logger
	last   atomic.Uint64 // number of the latest call
}

// Calls that come all the time and change nothing are logged at a level of their own.
var frequent = map[string]bool{
	"Probe": true, "GetPluginInfo": true, "GetPluginCapabilities": true, "ControllerGetCapabilities": true,
	"NodeGetCapabilities": true, "NodeGetVolumeStats": true, "GetCapacity": true,
}

func (c *calls) intercept(
	ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (response any, err error) {
	method := path.Base(info.FullMethod)
	logger := c.logger.WithValues("call", method, "request", c.last.Add(1))
	if r, ok := request.(interface{ GetVolumeId() string }); ok {
		logger = logger.WithValues("volume", r.GetVolumeId())
	}
	level := 2
	if frequent[method] {
		level = 6
	}
	begun := time.Now()
	logger.V(level+2).Info("begins", "content", redacted(request))
	response, err = guarded(klog.NewContext(ctx, logger), request, handler)
	took := time.Since(begun).Round(time.Microsecond).String()
	if err == nil {
		logger.V(level).Info("done", "took", took)
		logger.V(level+2).Info("answers", "content", redacted(response))
		return response, nil
	}
	st := statusOf(err)
	switch st.Code() {
	case codes.Internal, codes.DataLoss, codes.Unavailable:
		logger.Error(err, "failed", "code", st.Code().String(), "took", took)
	default:
		logger.Info("refused", "code", st.Code().String(), "reason", st.Message(), "took", took)
	}
	return nil, st.Err()
}

// guarded calls handler; a panic in it becomes an error.
func guarded(ctx context.Context, request any, handler grpc.UnaryHandler) (response any, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			klog.FromContext(ctx).Error(nil, "panic", "cause", cause, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	return handler(ctx, request)
}
