package timeline

import (
	"context"
	"runtime"

	"tidemark/internal/vault"
)

// eachSegment opens segments, some ahead, and hands them to fn in order; fn
// ends it with false or an error. An object that cannot be opened comes as the
// error. Objects are closed behind fn.
func eachSegment(ctx context.Context, v *vault.Vault, group string, refs []vault.Ref, fn func(i int, o *vault.Object, err error) (bool, error)) error {
	type opened struct {
		o   *vault.Object
		err error
	}
	ahead := max(2, runtime.GOMAXPROCS(0))
	slots := make([]chan opened, len(refs))
	start := func(i int) {
		if i < len(refs) {
			slots[i] = make(chan opened, 1)
			go func() { // ends with its reads; its result is always taken below
				o, err := v.OpenSegment(ctx, group, refs[i])
				slots[i] <- opened{o, err}
			}()
		}
	}
	started := 0
	for ; started < min(ahead, len(refs)); started++ {
		start(started)
	}
	var failed error
	on := true
	for i := 0; i < started; i++ {
		r := <-slots[i]
		slots[i] = nil
		if on && ctx.Err() == nil {
			on, failed = fn(i, r.o, r.err)
			on = on && failed == nil
		}
		if r.o != nil {
			r.o.Close() // opened to be read
		}
		if on && ctx.Err() == nil && started < len(refs) {
			start(started)
			started++
		}
	}
	if failed == nil {
		failed = ctx.Err()
	}
	return failed
}
