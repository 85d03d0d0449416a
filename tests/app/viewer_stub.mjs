// A viewer outside a browser, for the panel's modules: label maps of four voxels each.

/** By id: `{segments, values}`, as the viewer holds them. */
export const maps = new Map();

/** What making a label map waits for. */
export const making = { until: null };

export const image = (series) => ({ series, volume: { volumeId: series, dimensions: [4, 1, 1] } });

const manager = (id) => ({
  getCompleteScalarDataArray: () => maps.get(id).values,
  setCompleteScalarDataArray: (values) => {
    maps.get(id).values = Uint8Array.from(values);
  },
});

const segmentationService = {
  getSegmentations: () => [...maps].map(([segmentationId, { segments }]) => ({ segmentationId, segments })),
  getLabelmapVolume: (id) => (maps.has(id) ? { voxelManager: manager(id) } : null),
  getSegmentationRepresentations: () => [],
  addSegment: (id, { segmentIndex, label }) => {
    maps.get(id).segments[segmentIndex] = { segmentIndex, label };
  },
  remove: (id) => maps.delete(id),
};

globalThis.window = {
  services: { segmentationService, viewportGridService: { getState: () => ({ viewports: new Map() }) } },
  cornerstone: { eventTarget: null, triggerEvent: () => {} },
  cornerstoneTools: { Enums: { Events: {} } },
  commandsManager: {
    runCommand: async (_, { segmentations }) => {
      await making.until;
      for (const { segmentationId, config } of segmentations)
        maps.set(segmentationId, { segments: config.segments, values: new Uint8Array(4) });
    },
  },
};
