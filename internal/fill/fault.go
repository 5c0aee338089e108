package fill

// fault breaks one rule on purpose, so that the simulation can show that it
// would notice. It is never set outside this package's tests.
type fault uint8

const (
	faultNone          fault = iota
	faultRankAtReader        // rank without low-water mark: the reader's position when the read begins
	faultValidAtRead         // true from the reader's position when the read begins, without waiting for its end
	faultNoLastDrop          // fill before the low-water mark has passed the last drop
	faultIgnoreDropped       // fill under lost writes in flight
	faultOldScan             // trust a look at the bios in flight from before the drop
	faultKeepReopened        // let a fill stand whose blocks were dropped again
	faultKnownAnyPlace       // let a captured write from before the last drop close a block
	faultOldestMark          // at an equal place keep the older position
)
